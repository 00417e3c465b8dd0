"""How many processors count; workers that end with their parent; reading ahead by a bounded number."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_kd.data.workers import cpu_count, prefetch


def test_what_the_scheduler_gives_counts_where_it_says() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not say")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cpu_count() == len(before)


def test_where_it_does_not_say_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cpu_count() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_count() == 1


PROGRAM = """
import multiprocessing, os, time
from megatron_kd.data.workers import worker_pool

def work(number):
    time.sleep(0.2)
    return number, os.environ["RAYON_NUM_THREADS"]

if __name__ == "__main__":
    with worker_pool(2) as pool:
        print(*pool.map(work, range(3)), flush=True)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(60)
"""


def test_workers_have_one_thread_and_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout.readline().strip() == " ".join(str((i, "1")) for i in range(3))
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


def test_items_come_in_order() -> None:
    assert list(prefetch(lambda: iter(range(100)), depth=3)) == list(range(100))


def test_it_runs_ahead_by_the_depth_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    stream = prefetch(items, depth=4)
    next(stream)
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 6  # one taken, four waiting, one in hand
    stream.close()


def test_errors_surface_where_the_items_are_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("from the thread")

    stream = prefetch(items)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="from the thread"):
        next(stream)


def test_an_abandoned_stream_ends_its_thread() -> None:
    stream = prefetch(lambda: iter(range(10**9)))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
