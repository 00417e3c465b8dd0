"""SIGTERM and SIGUSR1: a checkpoint, status 75 within the stated time, and a resumed run with the same bits."""

import signal
import time

import pytest
import torch

from megatron_kd.errors import DataError
from megatron_kd.metrics.tracker import read_metrics
from tests.end_to_end.commands import SMALL, run, start
from tests.reference.full_state import load_full_state

STEPS = 60


def settings(dataset, folder, *more):
    return [f"data.path={dataset.path}", f"output={folder}", *SMALL, f"training.train_iters={STEPS}", *more]


def wait_for_rows(process, folder, rows):
    while process.poll() is None:
        try:
            if len(read_metrics(folder)) >= rows:
                return
        except DataError:  # not written yet
            pass
        time.sleep(0.01)
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run("train", *settings(dataset, folder)).status == 0
    return folder


def test_signals_save_and_leave_with_a_requeue_status(dataset, whole, tmp_path):
    folder = tmp_path / "run"
    for number, rows in ((signal.SIGTERM, 3), (signal.SIGUSR1, 12)):
        process = start("train", *settings(dataset, folder))
        wait_for_rows(process, folder, rows)
        process.send_signal(number)
        told = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 75, stderr
        assert time.monotonic() - told < 25
        assert stderr.count("told to stop: step") == 1 and "Traceback" not in stderr, stderr
    ended = run("train", *settings(dataset, folder))
    assert ended.status == 0 and "resumed at step" in ended.stderr
    (_, ours, _), (_, expected, _) = load_full_state(folder), load_full_state(whole)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert [row["loss"] for row in read_metrics(folder)] == [row["loss"] for row in read_metrics(whole)]


def test_a_process_that_does_not_get_there_ends_all_the_same(dataset, tmp_path):
    """A step that never ends."""
    program = tmp_path / "program.py"
    program.write_text(STUCK)
    process = start(
        "train", *settings(dataset, tmp_path / "run", "fault_tolerance.exit_within_seconds=1"), program=program
    )
    assert process.stderr.readline()
    wait_for_rows(process, tmp_path / "run", 2)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and 0.9 < time.monotonic() - told < 10, stderr
    assert "1 s after the signal (fault_tolerance.exit_within_seconds)" in stderr


STUCK = """
import time
from megatron_kd.logs import silence_known_noise
silence_known_noise()
from megatron_kd.training import train_step
real, calls = train_step.TrainStep.__call__, []
def step(self, *arguments, **options):
    calls.append(1)
    if len(calls) == 3:
        time.sleep(1000)
    return real(self, *arguments, **options)
train_step.TrainStep.__call__ = step
from megatron_kd.cli import main
if __name__ == "__main__":
    main("train")
"""
