"""Workers know what they were started with, have one thread for tokenising, and end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import multiprocessing, os, time
from megatron_kd.data.workers import worker_pool

started_with = []

def start(*words):
    started_with.extend(words)

def work(number):
    time.sleep(0.2)
    return number, started_with, os.environ["RAYON_NUM_THREADS"]

if __name__ == "__main__":
    with worker_pool(2, start, "a", 1) as pool:
        print(*pool.map(work, range(3)), flush=True)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(60)
"""


def test_workers_are_started_and_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout.readline().strip() == " ".join(str((i, ["a", 1], "1")) for i in range(3))
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_alive, workers))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"
