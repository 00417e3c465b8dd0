"""Ranks of a job with a remote teacher that die or are told to stop: everybody ends, in time, and says why."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.distributed.training.conftest import dataset, teacher  # noqa: F401
from tests.end_to_end.commands import REPOSITORY, environment

STUDENTS, TEACHERS = 2, 2
SECONDS = 60


@pytest.fixture
def start_ranks(dataset, teacher, tmp_path):  # noqa: F811
    """A function that starts every rank as a process of its own, without torchrun, and waits for the first steps."""
    processes = []

    def start(train_iters=100_000):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        keys = [
            f"data.path={dataset.path}", f"teacher.path={teacher}", f"output={tmp_path / 'run'}",
            "model.name=qwen_toy_student", "distillation.method=vanilla_kd", "teacher.placement=remote",
            f"teacher.num_ranks={TEACHERS}", "teacher.prefetch_depth=3", f"training.train_iters={train_iters}",
            "training.global_batch_size=8", "training.micro_batch_size=2",
        ]  # fmt: skip
        world = STUDENTS + TEACHERS
        for rank in range(world):
            variables = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                             MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
            processes.append(subprocess.Popen(
                [sys.executable, "tools/train.py", *keys], cwd=REPOSITORY, env={**environment(), **variables},
                stdout=subprocess.DEVNULL, stderr=open(tmp_path / f"stderr-{rank}", "w"), start_new_session=True,
            ))  # fmt: skip
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), 240)
        return processes

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing in {seconds} s"
        time.sleep(0.1)


def said(tmp_path):
    return "".join((tmp_path / f"stderr-{rank}").read_text() for rank in range(STUDENTS + TEACHERS))


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        (3, "rank 3 (teacher rank 1 of 2)"),
        pytest.param(0, "rank 0 (student rank 0", marks=pytest.mark.slow),
        pytest.param(1, "rank 1 (student rank 1 of 2)", marks=pytest.mark.slow),
        pytest.param(2, "rank 2 (teacher rank 0 of 2)", marks=pytest.mark.slow),
    ],
)
def test_a_dead_rank_ends_the_job_and_is_named(rank, name, start_ranks, tmp_path):
    processes = start_ranks()
    killed = time.monotonic()
    processes[rank].kill()
    wait_for(lambda: all(process.poll() is not None for process in processes), SECONDS)
    assert time.monotonic() - killed < SECONDS
    assert all(process.returncode == 1 for other, process in enumerate(processes) if other != rank)
    assert said(tmp_path).count(f"{name}") == 1 and "is gone" in said(tmp_path)


@pytest.mark.slow
def test_a_signal_saves_and_ends_all_ranks(start_ranks, tmp_path):
    processes = start_ranks()
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    wait_for(lambda: all(process.poll() is not None for process in processes), SECONDS)
    assert [process.returncode for process in processes[:STUDENTS]] == [75] * STUDENTS, said(tmp_path)
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
