"""The policy alone: spikes, skipping limits, what is kept in a checkpoint."""

import dataclasses
import json
import math

import pytest

from megatron_kd.config import load_config
from megatron_kd.errors import ConfigError
from megatron_kd.training.checkpoint import Progress
from megatron_kd.training.fault_tolerance import (
    EVENTS_NAME,
    FaultHistory,
    FaultPolicy,
    FaultToleranceConfig,
    LossStatistics,
)
from megatron_kd.training.train_config import TrainConfig


def fault_policy(folder, **keys):
    return FaultPolicy(FaultToleranceConfig(**keys), folder, is_main=True)


def noisy_losses(count, level=3.0):
    return [level + 0.1 * math.sin(7.0 * i) for i in range(count)]


def test_statistics_are_mean_and_variance():
    statistics, losses = LossStatistics(), noisy_losses(50)
    for loss in losses:
        statistics = statistics.add(loss)
    mean = sum(losses) / 50
    assert statistics.mean == pytest.approx(mean) and statistics.count == 50
    assert statistics.variance == pytest.approx(sum((x - mean) ** 2 for x in losses) / 50)
    assert statistics.deviations(mean + 2 * math.sqrt(statistics.variance)) == pytest.approx(2.0)


def test_a_spike_is_found_said_and_kept_but_noise_is_not(tmp_path, capsys):
    policy, history = fault_policy(tmp_path, spike_warmup_steps=20), FaultHistory()
    for step, loss in enumerate(noisy_losses(60), start=1):
        history, rolls_back = policy.after_loss(history, step, loss, [1])
        assert not rolls_back
    assert capsys.readouterr().err == ""
    history, rolls_back = policy.after_loss(history, 61, 6.0, [5, 8])
    said = capsys.readouterr().err
    assert not rolls_back and "step 61: loss spike: loss 6.0000" in said and "chunks of the batch: [5, 8]" in said
    (event,) = [json.loads(line) for line in (tmp_path / EVENTS_NAME).read_text().splitlines()]
    assert event["step"] == 61 and event["event"] == "loss spike"


def test_no_spike_before_the_warm_up_nor_where_detection_is_off(tmp_path, capsys):
    for keys in ({"spike_warmup_steps": 20}, {"spike_warmup_steps": 2, "spike_deviations": 0.0}):
        policy, history = fault_policy(tmp_path, **keys), FaultHistory()
        for step, loss in enumerate([*noisy_losses(10), 50.0], start=1):
            history, _ = policy.after_loss(history, step, loss, [])
    assert capsys.readouterr().err == ""


def test_a_lasting_new_level_stops_being_a_spike(tmp_path, capsys):
    policy, history = fault_policy(tmp_path, spike_warmup_steps=20), FaultHistory()
    for step, loss in enumerate([*noisy_losses(50), *noisy_losses(60, level=6.0)], start=1):
        history, _ = policy.after_loss(history, step, loss, [])
    lines = capsys.readouterr().err.splitlines()
    assert 0 < len(lines) < 30 and "step 110" not in lines[-1]


def test_rollbacks_are_limited(tmp_path, capsys):
    policy = fault_policy(tmp_path, spike_warmup_steps=20, spike_action="rollback", max_rollbacks=2)
    history = FaultHistory()
    for step, loss in enumerate(noisy_losses(40), start=1):
        history, _ = policy.after_loss(history, step, loss, [])
    answers = []
    for step in range(41, 44):
        before = history.losses
        history, rolls_back = policy.after_loss(history, step, 9.0, [])
        history = dataclasses.replace(history, losses=before)  # as a rollback does
        answers.append(rolls_back)
    assert answers == [True, True, False] and history.rollbacks == 2
    assert "2 were made (fault_tolerance.max_rollbacks)" in capsys.readouterr().err


def test_without_a_checkpoint_a_spike_leaves_the_rollbacks_alone(tmp_path, capsys):
    policy = fault_policy(tmp_path, spike_warmup_steps=20, spike_action="rollback", max_rollbacks=1)
    history = FaultHistory()
    for step, loss in enumerate(noisy_losses(40), start=1):
        history, _ = policy.after_loss(history, step, loss, [], has_checkpoint=False)
    history, rolls_back = policy.after_loss(history, 41, 9.0, [], has_checkpoint=False)
    assert not rolls_back and history.rollbacks == 0
    assert "step 41: no rollback: nothing saved" in capsys.readouterr().err


def test_skips_are_limited_and_counted(tmp_path):
    policy, history = fault_policy(tmp_path, non_finite="skip", max_skipped_batches=2), FaultHistory()
    for number in (1, 2):
        history = policy.skip(history, 5, "loss nan")
        assert history.skipped_batches == history.non_finite == number
    assert policy.skip(history, 5, "loss nan") is None
    assert fault_policy(tmp_path).skip(FaultHistory(), 5, "loss nan") is None, "the default is to stop"


def test_progress_passes_through_a_manifest_exactly():
    statistics = LossStatistics()
    for loss in noisy_losses(30):
        statistics = statistics.add(loss)
    progress = Progress(7, 70, 0.1, FaultHistory(skipped_batches=3, non_finite=2, rollbacks=1, losses=statistics))
    manifest = json.loads(json.dumps({"progress": progress.to_mapping()}))
    assert Progress.from_manifest(manifest) == progress and progress.position == 10
    old = {"progress": {"step": 7, "tokens": 70, "seconds": 0.5}}
    assert Progress.from_manifest(old) == Progress(7, 70, 0.5) and Progress.from_manifest(old).position == 7


@pytest.mark.parametrize(
    "key", ["exit_within_seconds=0", "spike_warmup_steps=1", "max_rollbacks=-1", "hang_minutes=-1", "non_finite=ignore"]
)
def test_refuses_values_that_make_no_sense(key):
    with pytest.raises(ConfigError, match=f"fault_tolerance.{key.split('=')[0]}"):
        load_config(
            TrainConfig, None, ["data.path=a", "output=b", "model.name=qwen_toy_student", f"fault_tolerance.{key}"]
        )
