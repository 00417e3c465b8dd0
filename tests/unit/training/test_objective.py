"""Token weights and what they are divided by; the objective of a configuration."""

import pytest
import torch

from megatron_kd.config import from_mapping
from megatron_kd.data.batch import Batch
from megatron_kd.errors import ConfigError
from megatron_kd.losses import ForwardKL, JensenShannon, Mixture
from megatron_kd.training.distillation_config import DistillationConfig
from megatron_kd.training.objective import build_objective, sequence_major, token_weights


def batch_with_mask(mask):
    mask = torch.tensor(mask, dtype=torch.float32)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return Batch(tokens=ids, labels=ids, loss_mask=mask, position_ids=ids, chunk_indices=torch.arange(len(mask)), key=0)


def mean_loss(losses, batch, reduction):
    """The quotient that training logs, from losses [b, s]."""
    weights, count = token_weights(batch, reduction)
    return float((sequence_major(losses) * weights).sum() / count)


def test_two_sequences_of_3_and_9_tokens_with_losses_1_and_2():
    """The closed form that tells the two reductions apart: 21 / 12 and (1 + 2) / 2."""
    batch = batch_with_mask([[1] * 3 + [0] * 6, [1] * 9])
    losses = torch.tensor([[1.0] * 9, [2.0] * 9])
    assert mean_loss(losses, batch, "token") == pytest.approx(1.75)
    assert mean_loss(losses, batch, "sequence") == pytest.approx(1.5)


def test_a_sequence_without_unmasked_tokens_counts_nowhere():
    batch = batch_with_mask([[0, 0], [1, 0], [1, 1]])
    losses = torch.tensor([[100.0, 100.0], [1.0, 100.0], [2.0, 4.0]])
    assert mean_loss(losses, batch, "token") == pytest.approx(7 / 3)
    assert mean_loss(losses, batch, "sequence") == pytest.approx((1 + 3) / 2)
    weights, count = token_weights(batch_with_mask([[0, 0]]), "sequence")
    assert not weights.any() and count == 0


def test_weights_are_in_the_order_of_hidden_states():
    batch = batch_with_mask([[1, 0, 1], [0, 1, 1]])
    weights, count = token_weights(batch, "token")
    assert weights.tolist() == [1, 0, 0, 1, 1, 1] and count == 4
    assert sequence_major(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == [1, 4, 2, 5, 3, 6]


def test_a_mixture_and_the_temperature_factor():
    keys = {"method": "vanilla_kd", "divergence": "0.9*forward_kl+0.1*jsd", "beta": 0.3, "temperature": 2.0}
    objective = build_objective(from_mapping(DistillationConfig, keys, "test"))
    assert objective.divergence == Mixture(((0.9, ForwardKL()), (0.1, JensenShannon(0.3))))
    assert objective.kd_factor == 0.5
    squared = build_objective(from_mapping(DistillationConfig, {**keys, "temperature_squared": True}, "test"))
    assert squared.kd_factor == 2.0


def test_objectives():
    plain = build_objective(DistillationConfig(kd_ratio=0.7))
    assert (plain.lm_weight, plain.kd_weight) == (1.0, 0.0)
    mixed = build_objective(DistillationConfig(method="vanilla_kd", kd_ratio=0.7, temperature=2.0))
    assert (mixed.lm_weight, mixed.kd_weight, mixed.temperature) == (pytest.approx(0.3), 0.7, 2.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kd_ratio": 1.5}, "between 0 and 1, not 1.5"),
        ({"temperature": 0}, "must be above 0"),
        ({"beta": 1.0}, "both excluded"),
        ({"skew_alpha": 1.0}, r"in \[0, 1\)"),
        ({"divergence": "kl"}, "'distillation.divergence': unknown divergence 'kl': use one of forward_kl"),
        ({"divergence": "0.5*kl+0.5*tvd"}, "unknown divergence '0.5"),
        ({"loss": {"tile_megabytes": 0}}, "'distillation.loss.tile_megabytes' must be at least 1"),
        ({"loss": {"chunk_megabytes": 0}}, "'distillation.loss.tile_megabytes' must be at least 1"),  # its old name
        ({"loss": {"backend": "cuda"}}, "must be one of auto, torch, triton"),
    ],
)
def test_values_that_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(DistillationConfig, keys, "test")
