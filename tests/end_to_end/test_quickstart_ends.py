"""How the quickstart ends when it cannot continue: one line, an exit status, no process left behind."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import REPOSITORY, environment

PROGRAM = REPOSITORY / "examples" / "quickstart" / "run.py"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the children")
def test_sigterm_ends_the_steps_too(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM), "--output", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (children := children_of(program.pid)):
            assert time.monotonic() < deadline and program.poll() is None
            time.sleep(0.02)
        program.terminate()
        _, stderr = program.communicate(timeout=60)
        assert program.returncode == 128 + signal.SIGTERM
        assert stderr.split("\n")[-2] == "quickstart: stopped; run it again to continue"
        assert not any(is_running(child) for child in children)
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """The corpus of 4 MB does not fit."""

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    ended = subprocess.run(
        [sys.executable, str(PROGRAM), "--output", str(tmp_path)],
        capture_output=True, text=True, env=environment(), preexec_fn=limit_file_size, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.strip().startswith("quickstart: step 'text' stopped: quickstart.corpus: the disk is full while")
    assert len(ended.stderr.strip().splitlines()) == 1
    assert list((tmp_path / "runs/quickstart/data").iterdir()) == []
