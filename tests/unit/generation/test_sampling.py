"""Draws follow the distribution that temperature, top-k and top-p leave."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_kd.data.random_numbers import sequence_seeds, uniforms
from megatron_kd.generation.generate import choose, sampling_logits
from megatron_kd.generation.sampling import SamplingConfig


def test_frequencies_are_probabilities():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, -torch.inf]]).expand(40_000, 5)
    seeds = sequence_seeds(1, "test", np.arange(40_000))
    tokens = choose(logits, torch.from_numpy(uniforms(seeds, 5)), SamplingConfig(temperature=0.7))
    expected = (logits[0].double() / 0.7).softmax(0)
    found = torch.bincount(tokens, minlength=5) / 40_000
    assert (found - expected).abs().max() < 4 * 0.5 / 200
    assert found[4] == 0


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
def test_ends_of_the_interval_give_ids_that_have_probability(draw):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf, -torch.inf]])
    token = choose(logits, torch.tensor([draw], dtype=torch.float64), SamplingConfig())
    assert token.item() == (1 if draw == 0 else 2)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 20, 0.6)]
)
def test_what_is_left_equals_transformers(temperature, top_k, top_p):
    logits = 2 * torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = sampling_logits(logits, SamplingConfig(temperature, top_k, top_p))
    assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize("keys", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_values_that_cannot_be(keys):
    assert len(list(SamplingConfig(**keys).validate())) == 1
