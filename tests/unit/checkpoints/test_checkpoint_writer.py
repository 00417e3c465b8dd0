"""Saves in the background: the state on disk is that of the save's moment; failures are raised; nothing is forked."""

import multiprocessing
import threading

import psutil
import pytest
import torch

from megatron_kd.checkpoints import sharded_save
from megatron_kd.checkpoints.checkpoint_writer import CheckpointWriter, Retention
from megatron_kd.checkpoints.weights import checkpoint_folders, open_checkpoint
from megatron_kd.errors import UserError
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.checkpoint import Progress, description, training_state
from tests.reference.full_state import load_full_state
from tests.reference.one_rank import TrainingParts

ABOUT = {"tokenizer_hash": "x", "seq_length": 32, "precision": "fp32"}


def begin(writer, parts, step, in_background=True):
    state = training_state(parts.model, parts.optimizer, parts.groups, is_loading=False)
    about = description(Progress(step=step), parts.architecture, ABOUT)
    writer.begin(step, state, about, in_background=in_background)


@pytest.fixture
def held_back(monkeypatch):
    """Writing waits until it is released."""
    release, real = threading.Event(), sharded_save.write_rank_file

    def write(*arguments):
        release.wait(30)
        return real(*arguments)

    monkeypatch.setattr(sharded_save, "write_rank_file", write)
    yield release
    release.set()


def test_what_is_saved_is_the_moment_of_the_save(dataset, tmp_path, held_back):
    with distributed_runtime() as runtime:
        parts, writer = TrainingParts(dataset, runtime), CheckpointWriter(tmp_path)
        adam = parts.optimizer.chained_optimizers[0].optimizer
        before = {name: p.detach().clone() for name, p in parts.model[0].module.named_parameters()}
        begin(writer, parts, 1)
        assert writer.is_writing and checkpoint_folders(tmp_path) == []
        with torch.no_grad():
            for parameter in parts.model[0].parameters():
                parameter.add_(1.0)
            for state in adam.state.values():
                state["exp_avg"].add_(1.0)
        held_back.set()
        assert writer.finish() == tmp_path / "step_1" and not writer.is_open
        open_checkpoint(tmp_path / "step_1").verify()
        _, state, _ = load_full_state(tmp_path / "step_1")
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), name


def test_the_next_save_waits_for_the_one_before(dataset, tmp_path):
    with distributed_runtime() as runtime:
        parts, writer = TrainingParts(dataset, runtime), CheckpointWriter(tmp_path, Retention(newest=2, every=2))
        for step in range(1, 7):
            begin(writer, parts, step)
        writer.finish()
        writer.wait_for_removal()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step_6", "step_5", "step_4", "step_2"]


def test_a_failure_in_the_background_is_raised_and_leaves_nothing(dataset, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with distributed_runtime() as runtime:
        parts, writer = TrainingParts(dataset, runtime), CheckpointWriter(tmp_path)
        begin(writer, parts, 1)
        writer.finish()
        monkeypatch.setattr(sharded_save, "write_rank_file", full)
        begin(writer, parts, 2)
        with pytest.raises(UserError, match="step_2 could not be written: .*No space left on device"):
            writer.finish()
        assert not writer.is_open
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]
    open_checkpoint(tmp_path).verify()


def test_an_abandoned_save_leaves_nothing(dataset, tmp_path, held_back):
    with distributed_runtime() as runtime:
        parts, writer = TrainingParts(dataset, runtime), CheckpointWriter(tmp_path)
        begin(writer, parts, 1)
        held_back.set()
        writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_no_process_is_started(dataset, tmp_path, monkeypatch):
    """Megatron-Core 0.16 forks its writers, and waits for ever for one that is killed."""
    monkeypatch.setattr(multiprocessing.Process, "start", lambda self: pytest.fail("a process was started"))
    with distributed_runtime() as runtime:
        parts, writer = TrainingParts(dataset, runtime), CheckpointWriter(tmp_path)
        children = psutil.Process().children(recursive=True)
        begin(writer, parts, 1, in_background=False)
        assert psutil.Process().children(recursive=True) == children
        writer.finish()
