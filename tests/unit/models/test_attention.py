"""Core attention against attention written out in float64; blocked attention against torch's."""

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.functional import scaled_dot_product_attention

from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.attention import SDPACoreAttention, blocked_causal_attention
from megatron_kd.models.gpt import transformer_config
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from tests.reference.one_rank import TINY


def attention(groups=4):
    architecture = ModelArchitecture(**{**vars(TINY), "num_query_groups": groups})
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    config = transformer_config(architecture, layout, precision="fp32", device=torch.device("cpu"))
    return SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


def naive(query, key, value, forbidden):
    """[s, b, heads, width] in float64, key and value repeated for their queries."""
    repeat = query.shape[2] // key.shape[2]
    q, k, v = (
        x.double().permute(1, 2, 0, 3)
        for x in (query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2))
    )
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(forbidden, float("-inf"))
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 17, 70])
def test_causal(groups, length):
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(length, 2, 4, 8, generator=generator)
    key, value = (torch.randn(length, 2, groups, 8, generator=generator) for _ in range(2))
    above = torch.ones(length, length, dtype=torch.bool).triu(1)
    torch.testing.assert_close(
        attention(groups)(query, key, value, None).double(), naive(query, key, value, above), atol=1e-5, rtol=1e-5
    )


def test_an_explicit_mask_forbids_where_it_is_true():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(12, 2, 4, 8, generator=generator) for _ in range(3))
    forbidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
    forbidden[6:, :6] = True  # two documents that do not see each other
    ours = attention()(query, key, value, forbidden.expand(2, 1, 12, 12))
    torch.testing.assert_close(ours.double(), naive(query, key, value, forbidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 64, 65, 200])
def test_equals_torch_attention(length):
    generator = torch.Generator().manual_seed(length)
    mixed = torch.randn(length, 6, 3 * 8, generator=generator, dtype=torch.float64)
    upstream = torch.randn(length, 6, 8, generator=generator, dtype=torch.float64)
    ours, reference = mixed.clone().requires_grad_(), mixed.clone().requires_grad_()
    output = blocked_causal_attention(*ours.split(8, dim=-1), 0.3)
    output.backward(upstream)
    expected = scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in reference.split(8, dim=-1)), is_causal=True, scale=0.3
    ).transpose(0, 1)
    expected.backward(upstream)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ours.grad, reference.grad)


def test_a_key_after_the_query_has_no_influence():
    mixed = torch.randn(70, 2, 12)
    before = blocked_causal_attention(*mixed.split(4, dim=-1), 0.5)
    mixed[69] = 100.0
    after = blocked_causal_attention(*mixed.split(4, dim=-1), 0.5)
    torch.testing.assert_close(before[:69], after[:69])
    assert not torch.allclose(before[69], after[69])
