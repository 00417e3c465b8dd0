"""One writer of a run folder at a time: in this process, in another, past forked children and kills."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_kd.errors import ConfigError
from megatron_kd.training.run_folder import RunLock

HOLD = (
    "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
    "print('locked', flush=True); time.sleep(60)"
)


def taken(folder):
    lock = RunLock(folder)
    lock.take()
    return lock


def test_one_run_at_a_time(tmp_path):
    folder = tmp_path / "a" / "run"
    first = taken(folder)
    with pytest.raises(ConfigError, match="another run is training there; wait for it, end it or choose another"):
        taken(folder)
    (folder / "config.yaml").touch()
    first.release()
    taken(folder).release()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"], "a folder that holds something stays"


def test_no_folder_is_left_that_was_made_for_the_lock(tmp_path):
    taken(tmp_path / "a" / "run").release()
    (tmp_path / "empty").mkdir()
    taken(tmp_path / "empty").release()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"], "one that was there stays"


def test_what_can_be_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder, reason in ((tmp_path / "file", "is not a folder"), (tmp_path / "file" / "a", "cannot be a run folder")):
        with pytest.raises(ConfigError, match=reason):
            taken(folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_keep_it(tmp_path):
    lock = taken(tmp_path)
    child = os.fork()
    if child == 0:  # uses nothing of the parent's
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        taken(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_killed_process_leaves_it_to_the_next(tmp_path):
    arguments = [sys.executable, "-S", "-c", HOLD, str(tmp_path / ".writer.lock")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="another run is training there"):
            taken(tmp_path)
        other.kill()
    taken(tmp_path).release()
