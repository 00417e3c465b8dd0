import ast
import errno
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_kd import cli
from megatron_kd.errors import DataError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ToyConfig:
    path: str
    steps: int = 3


TOY = SimpleNamespace(ToyConfig=ToyConfig)
"""The module of the verb ``toy``."""


def behaviour(run: Callable[[ToyConfig], Any]) -> None:
    """Set what the verb does."""
    TOY.run = run


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_kd.toys.toy", TOY)
    monkeypatch.setitem(cli.VERBS, "toy", cli.Verb("toys.toy.ToyConfig", "a verb for tests"))


def call(capsys: pytest.CaptureFixture[str], *arguments: str, verb: str | None = "toy") -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(verb, list(arguments))
    found = capsys.readouterr()
    return ended.value.code or 0, found.out, found.err


def test_success_is_status_0(toy: None, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[ToyConfig] = []
    behaviour(seen.append)
    assert call(capsys, "path=p", "steps=4") == (0, "", "")
    assert seen == [ToyConfig("p", 4)]


def test_a_dry_run_prints_the_resolved_configuration_and_does_nothing(
    toy: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    behaviour(lambda config: pytest.fail("ran"))
    (tmp_path / "c.yaml").write_text("path: from file\n")
    for arguments in (
        ["--config", f"{tmp_path}/c.yaml", "steps=5", "--dry-run"],
        ["steps=5", "--dry-run", f"--config={tmp_path}/c.yaml"],
    ):
        assert call(capsys, *arguments) == (0, "path: from file\nsteps: 5\n", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("corpus.jsonl:3:\n  bad"), "toy: corpus.jsonl:3: bad\n"),
        (
            OSError(errno.ENOSPC, "full", "out/x"),
            "toy: the disk is full while writing out/x: free space and run again\n",
        ),
        (OSError(errno.EDQUOT, "quota"), "toy: the disk is full while writing the output: free space and run again\n"),
        (OSError(errno.EFBIG, "big", "out"), "toy: the disk is full while writing out: free space and run again\n"),
    ],
)
def test_an_error_that_the_user_can_fix_is_status_2_and_one_line(
    toy: None, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def fail(config: ToyConfig) -> None:
        raise error

    behaviour(fail)
    assert call(capsys, "path=p") == (2, "", line)


def test_other_errors_show_their_traceback(toy: None) -> None:
    def fail(config: ToyConfig) -> None:
        raise OSError(errno.EIO, "broken disk")

    behaviour(fail)
    with pytest.raises(OSError, match="broken disk"):
        cli.main("toy", ["path=p"])


def test_one_rank_reports_for_all(
    toy: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", rank)
        status, _, errors = call(capsys, "nothing=1", "path=p")
        assert (status, errors.count("\n")) == (2, lines)


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["--config"], ["path"], ["steps=x", "path=p"], []])
def test_a_bad_command_line_is_status_2_and_one_line(
    toy: None, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    behaviour(lambda config: None)
    status, output, errors = call(capsys, *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1), errors
    assert errors.startswith("toy: ")


def test_verbs_are_listed_and_unknown_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = call(capsys, "--help", verb=None)
    assert status == 0 and all(name in output for name in cli.VERBS)
    for arguments, said in (([], "no verb given"), (["tokenise_corpus"], "'tokenise_corpus' is not a verb")):
        status, _, errors = call(capsys, *arguments, verb=None)
        assert status == 2 and said in errors and errors.count("\n") == 1


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_its_tool_and_its_function(verb: str) -> None:
    package = cli.VERBS[verb].config.rsplit(".", 2)[0].replace(".", "/")
    functions = ast.parse((ROOT / "megatron_kd" / package / f"{verb}.py").read_text()).body
    assert "run" in [node.name for node in functions if isinstance(node, ast.FunctionDef)]
    assert f'main("{verb}")' in (ROOT / "tools" / f"{verb}.py").read_text()


def test_a_tool_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "inspect_dataset.py"), f"path={tmp_path}", "pth=1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "did you mean 'path'?" in result.stderr


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_a_configuration_is_read_without_torch(verb: str) -> None:
    """A misspelt key is refused at once: what takes seconds to import is imported after the configuration is read."""
    code = (
        f"import sys; from megatron_kd.cli import VERBS; VERBS[{verb!r}].load_config_class()\n"
        "assert not {'torch', 'megatron.core', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
