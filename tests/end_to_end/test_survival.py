"""A run that meets a batch without a finite loss, a loss that jumps, a rank that hangs, data that changed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from megatron_kd.metrics.tracker import read_metrics
from megatron_kd.training.fault_tolerance import EVENTS_NAME
from tests.end_to_end.commands import REPOSITORY, SMALL, environment, kill, run, start
from tests.reference.full_state import load_full_state

STEPS = 12
POISONED = """
import os
from megatron_kd.logs import silence_known_noise
silence_known_noise()
import dataclasses
from megatron_kd.training import train_step
positions, factor = eval(os.environ["POISONED"]), float(os.environ["FACTOR"])
finish, begun = train_step.TrainStep._finish, []
zero = train_step.TrainStep._zero_gradients
def note(self):
    begun.append(1)
    zero(self)
def poison(self, sums):
    position = len(begun) - 1 + int(os.environ.get("FIRST", 0))
    if position in positions:
        sums = {**sums, "loss": sums["loss"] * factor}
    return finish(self, sums)
train_step.TrainStep._finish, train_step.TrainStep._zero_gradients = poison, note
from megatron_kd.cli import main
if __name__ == "__main__":
    main("train")
"""


def settings(dataset, folder, *more):
    return [f"data.path={dataset.path}", f"output={folder}", *SMALL, f"training.train_iters={STEPS}", *more]


@pytest.fixture
def poisoned_run(dataset, tmp_path, monkeypatch):
    """``train`` in which the loss of the batches at some positions is multiplied by a factor."""
    program = tmp_path / "program.py"
    program.write_text(POISONED)

    def train(positions, factor, *keys, ranks=1):
        monkeypatch.setenv("POISONED", repr(positions))
        monkeypatch.setenv("FACTOR", factor)
        return run("train", *settings(dataset, tmp_path / "run", *keys), ranks=ranks, program=program), tmp_path / "run"

    return train


def test_a_loss_that_is_not_finite_stops_and_names_the_chunks(poisoned_run):
    ended, folder = poisoned_run({5}, "nan", "training.save_interval=4")
    assert ended.status == 2 and len(read_metrics(folder)) == 5
    line = ended.lines[-1]
    assert "step 6: loss nan" in line and "chunks of the batch: [" in line and line.count(",") >= 15


def test_skipped_batches_are_not_learnt_from_and_the_next_ones_are(poisoned_run):
    ended, folder = poisoned_run({5, 6}, "inf", "fault_tolerance.non_finite=skip", ranks=2)
    assert ended.status == 0, ended.stderr
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, STEPS + 1))
    events = [json.loads(line) for line in (folder / EVENTS_NAME).read_text().splitlines()]
    assert [event["event"] for event in events] == ["skipped batch"] * 2 and "chunks of the batch" in events[0]["text"]
    _, _, manifest = load_full_state(folder)
    incidents = manifest["progress"]["incidents"]
    assert incidents["skipped_batches"] == incidents["non_finite"] == 2


@pytest.mark.slow
def test_a_rollback_resumes_from_the_checkpoint_with_the_batches_after_the_spike(poisoned_run, dataset, tmp_path):
    """The end must be that of a run from the same checkpoint which never saw the batches between."""
    keys = ["training.save_interval=4", "fault_tolerance.spike_warmup_steps=3", "training.keep_checkpoints=9"]
    ended, folder = poisoned_run({6}, "50", *keys, "fault_tolerance.spike_action=rollback")
    assert ended.status == 0, ended.stderr
    assert "step 7: loss spike" in ended.stderr and "resuming from step 4 with global batch 7" in ended.stderr
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    _, state, manifest = load_full_state(folder)
    assert manifest["progress"]["incidents"]["skipped_batches"] == 3
    assert manifest["progress"]["incidents"]["rollbacks"] == 1
    # The same from the checkpoint at step 4 in a process of its own, told to begin at position 7.
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    program = tmp_path / "moved.py"
    program.write_text(MOVED)
    os.rename(folder / "checkpoints" / "step_4", other / "checkpoints" / "step_4")
    ended = run("train", *settings(dataset, other, *keys), program=program)
    assert ended.status == 0, ended.stderr
    _, expected, _ = load_full_state(other)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


MOVED = """
from megatron_kd.logs import silence_known_noise
silence_known_noise()
import dataclasses
from megatron_kd.training import train as run
real = run.load_checkpoint
def load(*arguments):
    progress = real(*arguments)
    return dataclasses.replace(progress, incidents=dataclasses.replace(progress.incidents, skipped_batches=3))
run.load_checkpoint = load
from megatron_kd.cli import main
if __name__ == "__main__":
    main("train")
"""


def test_a_rank_that_hangs_is_named(dataset, tmp_path):
    folder = tmp_path / "run"
    keys = ["training.train_iters=100000", "fault_tolerance.hang_minutes=0.1"]
    process, children = start("train", *settings(dataset, folder, *keys), ranks=2), []
    try:
        while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        children = [int(pid) for pid in os.popen(f"pgrep -P {process.pid}").read().split()]
        victim = next(pid for pid in children if rank_of(pid) == "1")
        os.kill(victim, signal.SIGSTOP)
        line = next(line for line in process.stderr if "has not ended after" in line)
    finally:
        kill(process)
        for child in children:  # in sessions of their own, and one of them stopped
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert "rank 1 does not answer" in line and "rank 0 wait" in line and "fault_tolerance.hang_minutes" in line


def rank_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        values = dict(entry.split(b"=", 1) for entry in file.read().split(b"\0") if b"=" in entry)
    return values.get(b"RANK", b"").decode()


DIES_ONCE = """
import os, signal
from megatron_kd.logs import silence_known_noise
silence_known_noise()
from megatron_kd.training import train_step
real, calls = train_step.TrainStep.__call__, []
def step(self, *arguments, **options):
    calls.append(1)
    if len(calls) == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *arguments, **options)
train_step.TrainStep.__call__ = step
from megatron_kd.cli import main
if __name__ == "__main__":
    main("train")
"""


@pytest.mark.slow
def test_torchrun_starts_again_from_the_newest_checkpoint(dataset, tmp_path):
    program, folder, whole = tmp_path / "program.py", tmp_path / "run", tmp_path / "whole"
    program.write_text(DIES_ONCE)
    arguments = settings(dataset, folder, "training.save_interval=2")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    ended = subprocess.run(
        [sys.executable, *launcher, str(program), *arguments],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0 and "resumed at step" in ended.stderr, ended.stderr
    assert run("train", *settings(dataset, whole), ranks=2).status == 0
    (_, ours, _), (_, expected, _) = load_full_state(folder), load_full_state(whole)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
