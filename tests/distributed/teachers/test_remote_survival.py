"""Skips, a signal, a resumed run, rollback while a remote teacher is ahead: the bits of a co-located teacher's run."""

import os
import signal
from unittest.mock import patch

import pytest
import torch

from megatron_kd.metrics.tracker import read_metrics
from tests.distributed.fresh_world import run_in_fresh_world
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import whole_weights

SKIPPED, SIGNALLED, SPIKE = 3, 5, 8
STEPS = 12
COMMON = [
    "model.name=qwen_toy_student", f"training.train_iters={STEPS}", "training.global_batch_size=8",
    "training.micro_batch_size=4", "training.save_interval=2", "distillation.method=vanilla_kd",
    "fault_tolerance.non_finite=skip", "fault_tolerance.spike_warmup_steps=3", "fault_tolerance.spike_action=rollback",
]  # fmt: skip
REMOTE = ["teacher.placement=remote", "teacher.num_ranks=1", "teacher.prefetch_depth=3"]


def troubled_run_here(settings, is_signalled):
    """``train`` whose batch at SKIPPED has no finite loss, at SPIKE a huge one; a signal comes at SIGNALLED."""
    from megatron_kd.config import load_config
    from megatron_kd.errors import Preempted
    from megatron_kd.logs import silence_known_noise
    from megatron_kd.training.train import TrainConfig, run
    from megatron_kd.training.train_step import TrainStep
    from megatron_kd.training.trainer import Trainer

    silence_known_noise()
    finish, train_one, seen = TrainStep._finish, Trainer._train_one, {}

    def note_position(self, batches, progress):
        seen["position"] = progress.position
        if is_signalled and progress.position == SIGNALLED:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_one(self, batches, progress)

    def trouble(self, sums):
        factor = {SKIPPED: float("nan"), SPIKE: 50.0}.get(seen["position"], 1.0)
        return finish(self, {**sums, "loss": sums["loss"] * factor})

    with patch.object(TrainStep, "_finish", trouble), patch.object(Trainer, "_train_one", note_position):
        try:
            run(load_config(TrainConfig, None, settings))
        except Preempted as error:
            return str(error)
    return "ended"


@pytest.mark.slow
@pytest.mark.parametrize("payload", ["hidden", "sampled"])
def test_trouble_with_a_teacher_that_is_ahead(payload, dataset, teacher, tmp_path):
    common = [f"data.path={dataset.path}", f"teacher.path={teacher}", *COMMON]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    remote = [*common, *REMOTE, f"teacher.payload={payload}"]
    if payload == "hidden":
        keys = [*common, "teacher.placement=colocated", f"output={whole}"]
        assert shared_ranks(1).run(troubled_run_here, keys, False, timeout=300) == ["ended"]
    else:
        run_in_fresh_world(2, troubled_run_here, [*remote, f"output={whole}"], False)
    keys = [*remote, f"output={folder}"]
    told, _ = run_in_fresh_world(2, troubled_run_here, keys, True)
    assert f"step {SIGNALLED} of {STEPS} is saved" in told
    assert run_in_fresh_world(2, troubled_run_here, keys, False)[0] == "ended"
    events = (folder / "events.jsonl").read_text()
    assert events == (whole / "events.jsonl").read_text()
    assert events.count("skipped batch") == 1 and "resuming from step 6 with global batch 9" in events
    ours, expected = (read_metrics(path) for path in (folder, whole))
    for key in ("step", "tokens", "loss", "lm_loss", "kd_loss", "grad_norm"):
        assert [row[key] for row in ours] == [row[key] for row in expected], key
    weights = [shared_ranks(1).run(whole_weights, str(path))[0] for path in (folder, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
