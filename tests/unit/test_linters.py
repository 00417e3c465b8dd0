"""The Dockerfile under hadolint, every shell script under ShellCheck, and the checks that hooks and CI run."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [*REPOSITORY.glob("examples/**/*.sh"), *REPOSITORY.glob("examples/**/*.sbatch"), REPOSITORY / ".ci/run"]
)


def linter(name):
    """The program beside this interpreter, or on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip(f"{name} comes with the test requirements on Linux x86_64 only")
    assert found, f"{name} is not installed: it is one of the test requirements (make install)"
    return found


def lint(name, *arguments):
    return subprocess.run([linter(name), *arguments], cwd=REPOSITORY, capture_output=True, text=True)


def test_the_dockerfile():
    ended = lint("hadolint", "Dockerfile")
    assert ended.returncode == 0, ended.stdout


def test_hadolint_finds_faults(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM nvcr.io/nvidia/pytorch\nRUN cd /tmp && pip install numpy\n")
    ended = lint("hadolint", str(tmp_path / "Dockerfile"))
    assert ended.returncode == 1 and "DL3006" in ended.stdout


def test_the_dockerfile_is_pinned_and_runs_as_an_ordinary_user():
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    image = next(line for line in lines if line.startswith("FROM"))
    assert image.partition(":")[2] not in ("", "latest")
    assert [line for line in lines if line.startswith("USER")][-1] not in ("USER root", "USER 0")


def test_hooks_and_continuous_integration_run_the_checks():
    makefile = (REPOSITORY / "Makefile").read_text()
    checks = re.search(r"^checks:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE).group(1)
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    commands = {hook["entry"].replace(".venv", "$(VENV)").replace(" --force-exclude", "") for hook in hooks}
    assert commands == {line.strip("\t@").removesuffix(" .") for line in checks.splitlines()}
    assert "make checks\n" in (REPOSITORY / ".ci/run").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts(script):
    ended = lint("shellcheck", "-x", script)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.endswith(".sh") and Path(s).stem not in ("paths", "functions")]
)
def test_steps_can_be_started(script):
    assert (REPOSITORY / script).stat().st_mode & 0o111, f"{script} is not executable"
