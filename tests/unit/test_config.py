from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from megatron_kd.config import dump_yaml, from_mapping, load_config, to_mapping
from megatron_kd.errors import ConfigError
from megatron_kd.training.train_config import TrainConfig


@dataclass(frozen=True)
class Inner:
    path: str
    rate: float = 0.1

    def validate(self) -> Iterator[str]:
        if self.rate < 0:
            yield f"inner.rate must not be negative, not {self.rate}"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    steps: int
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    flag: bool = False
    limit: int | None = 5
    extra: dict[str, Any] = field(default_factory=dict)
    optional: Inner = field(default_factory=lambda: Inner("default"))

    def validate(self) -> Iterator[str]:
        if self.steps < 1:
            yield f"steps must be at least 1, not {self.steps}"


GOOD = {"inner": {"path": "p"}, "steps": 3}


def write(path: Path, tree: object) -> Path:
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def test_overrides_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", {**GOOD, "names": ["x", "y"], "limit": 7})
    config = load_config(
        Outer, path, ["inner.rate=6e-4", "kind=b", "flag=true", "limit=null", "names=[z]", "extra={k: 1}"]
    )
    assert config == Outer(Inner("p", 6e-4), 3, "b", ("z",), True, None, {"k": 1})


def test_the_command_line_alone() -> None:
    config = load_config(Outer, None, ["inner.path=1e3", "steps=1e3", "names=one"])
    assert config.inner.path == "1e3" and config.steps == 1000 and config.names == ("one",)


def test_a_value_may_hold_equal_signs_and_be_empty() -> None:
    assert load_config(Inner, None, ["path=a=b"]).path == "a=b"
    assert load_config(Inner, None, ["path="]).path == ""


def test_a_date_is_a_string(tmp_path: Path) -> None:
    assert load_config(Inner, None, ["path=2026-11-21"]).path == "2026-11-21"
    assert load_config(Inner, write(tmp_path / "c.yaml", "path: 2026-11-21")).path == "2026-11-21"


def test_a_file_builds_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", {**GOOD, "names": ["x"], "kind": "b"})
    write(tmp_path / "sub" / "middle.yaml", {"base": "../base.yaml", "inner": {"rate": 0.5}, "names": ["m"]})
    top = write(tmp_path / "top.yaml", {"base": "sub/middle.yaml", "steps": 9})
    assert load_config(Outer, top) == Outer(Inner("p", 0.5), 9, "b", ("m",))


def test_interpolation(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "inner: {path: 'runs/${kind}'}\nsteps: 1\nkind: b\n")
    assert load_config(Outer, path).inner.path == "runs/b"


def test_a_round_trip_through_yaml(tmp_path: Path) -> None:
    config = from_mapping(Outer, {**GOOD, "names": ["é", "b"], "limit": None}, "test")
    assert load_config(Outer, write(tmp_path / "c.yaml", dump_yaml(config))) == config
    assert list(yaml.safe_load(dump_yaml(config))) == list(to_mapping(config))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stesp=4"], "unknown key 'stesp' (did you mean 'steps'?)"),
        (["inner.pth=4"], "unknown key 'inner.pth' (did you mean 'inner.path'?)"),
        (["rate=4"], "unknown key 'rate' (did you mean 'inner.rate'?)"),
        (["zzzzqqq=4"], "unknown key 'zzzzqqq'"),
        (["steps=many"], "'steps' must be of type int, not 'many'"),
        (["steps=1.5"], "'steps' must be of type int, not 1.5"),
        (["steps=true"], "'steps' must be of type int, not True"),
        (["steps=.inf"], "'steps' must be of type int, not inf"),
        (["flag=1"], "'flag' must be of type bool, not 1"),
        (["kind=c"], "'kind' must be one of a, b, not 'c'"),
        (["limit=x"], "'limit' must be of type int, not 'x'"),
        (["inner=5"], "'inner' must be a mapping of keys, not 5"),
        (["extra=5"], "'extra' must be a mapping of keys, not 5"),
        (["steps=null"], "'steps' must be of type int, not None"),
        (["steps=0"], "steps must be at least 1, not 0"),
        (["steps"], "'steps' is not of the form key=value"),
        (["a..b=1"], "'a..b=1' is not of the form key=value"),
        (["steps=1", "steps.more=2"], "sets a key below one that has a plain value"),
        (["inner.path=${nowhere}"], "nowhere"),
    ],
)
def test_every_fault_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(tmp_path / "c.yaml", GOOD), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, None, ["kind=c", "inner.rate=x", "stesp=1"])
    for part in ("'kind'", "'inner.rate'", "'stesp'", "'inner.path' is required", "'steps' is required"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, None, ["steps=0", "inner.path=p", "inner.rate=-1"])
    assert "inner.rate must not be negative, not -1.0; steps must be at least 1, not 0" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "the top level must be a mapping of keys, not list"),
        ("base: none.yaml", "none.yaml: cannot read the configuration file"),
        ("base: c.yaml", "does a file name itself as its base?"),
        ("base: 5\nsteps: 1", "cannot read the configuration file"),
        ("", "'steps' is required"),
        ("\xff", ""),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="none.yaml: cannot read the configuration file"):
        load_config(Outer, "none.yaml")


def test_an_override_of_a_list_in_a_file_that_is_given_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_config(Outer, write(tmp_path / "c.yaml", {**GOOD, "names": ["x"]}), ["names.first=1"])
    write(tmp_path / "base.yaml", {**GOOD, "names": ["x"]})
    with pytest.raises(ConfigError, match="top.yaml: "):
        load_config(Outer, write(tmp_path / "top.yaml", {"base": "base.yaml", "names": {"first": 1}}))


def test_where_two_sections_have_the_same_key_the_first_is_suggested() -> None:
    keys = ["data.path=d", "output=o", "model.name=qwen_toy_student"]
    for wrong, right in (
        ("tensor_model_parallel_size=2", "parallel.tensor_model_parallel_size"),
        ("pipline_model_parallel_size=2", "parallel.pipeline_model_parallel_size"),
        ("teacher.tensor_model_parallel_siz=2", "teacher.tensor_model_parallel_size"),
    ):
        with pytest.raises(ConfigError, match=rf"unknown key '{wrong[:-2]}' \(did you mean '{right}'\?\)"):
            load_config(TrainConfig, None, [*keys, wrong])


@dataclass(frozen=True)
class WithNewNames:
    RENAMED: ClassVar[dict[str, str]] = {"old": "inner", "text": "rollout"}
    inner: Inner = field(default_factory=lambda: Inner("default"))
    rollout: int = 3


def test_a_renamed_key_still_works_with_a_warning(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("old: {path: p, rate: 0.5}\n")
    config = load_config(WithNewNames, path, ["text=7"])
    assert (config.inner.rate, config.rollout) == (0.5, 7)
    said = capsys.readouterr().err
    assert "'old' is now called 'inner'" in said and "'text' is now called 'rollout'" in said


def test_both_names_of_a_key_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'text' is the old name of 'rollout': give only one of them"):
        load_config(WithNewNames, None, ["text=7", "rollout=8"])
