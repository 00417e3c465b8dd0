"""Blocked attention against torch's own, outputs and gradients, on odd lengths and strided inputs."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_kd.models.attention import blocked_causal_attention


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
