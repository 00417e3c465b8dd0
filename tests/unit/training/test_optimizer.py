"""Learning rates, weight decay groups, clipping, and torch's AdamW inside Megatron-Core's optimizer."""

import math

import pytest
import torch

from megatron_kd.config import from_mapping
from megatron_kd.errors import ConfigError
from megatron_kd.parallel.mcore_patches.remedies import clipped_step
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.optimizer import build_optimizer, learning_rate
from megatron_kd.training.train_config import OptimizerConfig
from tests.reference.one_rank import TrainingParts

SCHEDULE = OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_iters=10)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 1e-4),
        (5, 5e-4),
        (9, 9e-4),
        (10, 1e-3),
        (55, 5.5e-4),
        (100, 1e-4),
        (1000, 1e-4),
        (40, 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi / 3))),
    ],
)
def test_warm_up_and_cosine(step, rate):
    assert learning_rate(step, SCHEDULE, 100) == pytest.approx(rate, rel=1e-12, abs=1e-18)


def test_rates_without_warm_up_start_at_the_top_and_end_at_a_tenth():
    assert learning_rate(0, OptimizerConfig(lr=2e-3), 50) == 2e-3
    assert learning_rate(50, OptimizerConfig(lr=2e-3), 50) == pytest.approx(2e-4)
    assert learning_rate(3, OptimizerConfig(lr=1.0, lr_warmup_iters=4), 4) == 0.75


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": 0}, "'optimizer.lr' must be above 0"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "between 0 and optimizer.lr"),
        ({"clip_grad": -1}, "'optimizer.clip_grad' must not be negative"),
        ({"adam_beta2": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_values_that_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(OptimizerConfig, keys, "test")


def adam_parameters(optimizer):
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, group, part.optimizer.state[parameter]


@pytest.mark.parametrize("everywhere", [True, False])
def test_weight_decay_groups(dataset, everywhere):
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        config = OptimizerConfig(weight_decay=0.3, weight_decay_on_norms_and_biases=everywhere)
        optimizer = build_optimizer(config, parts.model, parts.groups, bf16=False)
        decayed = {0.0: 0, 0.3: 0}
        for parameter, group, _ in adam_parameters(optimizer):
            decayed[group["weight_decay"]] += parameter.numel()
        vectors = sum(p.numel() for p in parts.model[0].parameters() if p.dim() == 1)
        everything = sum(p.numel() for p in parts.model[0].parameters())
    assert decayed == ({0.0: 0, 0.3: everything} if everywhere else {0.0: vectors, 0.3: everything - vectors})


def set_gradients(parts, value):
    for parameter in parts.model[0].parameters():
        parameter.main_grad.fill_(value)
    parts.optimizer.prepare_grads()
    return float(parts.optimizer.get_grad_norm())


def test_one_step_is_adamw_written_out(dataset):
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        before = [parameter.detach().clone() for parameter in parts.model[0].parameters()]
        parts.model[0].zero_grad_buffer()
        norm = set_gradients(parts, 0.01)
        count = sum(value.numel() for value in before)
        assert norm == pytest.approx(0.01 * math.sqrt(count), rel=1e-4)
        clipped_step(parts.optimizer, norm, 1.0)
        gradient = 0.01 / (norm + 1e-6)
        settings = parts.config.optimizer
        step = settings.lr * gradient / (gradient + settings.adam_eps)  # both bias corrections cancel at step 1
        for parameter, old in zip(parts.model[0].parameters(), before):
            expected = old * (1 - settings.lr * settings.weight_decay) - step
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-8)


def test_bf16_keeps_fp32_master_weights(dataset):
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime, precision="bf16")
        assert {parameter.dtype for parameter, _, _ in adam_parameters(parts.optimizer)} == {torch.float32}
        assert {parameter.dtype for parameter in parts.model[0].parameters()} == {torch.bfloat16}
