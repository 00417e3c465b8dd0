"""The rotation against Megatron-Core's unfused one, values and gradients; it keeps lengths."""

import pytest
import torch

from megatron_kd.models.local_modules import apply_rotary
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import tiny_model


def angles(length: int, width: int) -> torch.Tensor:
    half = torch.outer(torch.arange(length, dtype=torch.float64), torch.arange(1, width // 2 + 1) * 0.3)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def test_equals_megatron_core() -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 2, 3, 8, generator=generator, dtype=torch.float64)
    upstream = torch.randn(7, 2, 3, 8, generator=generator, dtype=torch.float64)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    result, expected = apply_rotary(ours, angles(7, 8)), _apply_rotary_pos_emb_bshd(theirs, angles(7, 8))
    torch.testing.assert_close(result, expected)
    result.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_lengths_are_kept_and_position_0_is_not_moved() -> None:
    values = torch.randn(5, 1, 2, 4, dtype=torch.float64)
    rotated = apply_rotary(values, angles(5, 4))
    torch.testing.assert_close(rotated.norm(dim=-1), values.norm(dim=-1))
    torch.testing.assert_close(rotated[0], values[0])
    assert not torch.allclose(rotated[1:], values[1:])


@pytest.mark.parametrize("interleaved, width", [(True, 4), (False, 2)])
def test_what_it_cannot_do_is_refused(interleaved: bool, width: int) -> None:
    with pytest.raises(NotImplementedError, match="channels"):
        apply_rotary(torch.zeros(5, 1, 2, 4), angles(5, width), interleaved)


def test_a_model_on_a_cpu_calls_it() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    with distributed_runtime():
        assert tiny_model().config.apply_rope_fusion
    assert rope_utils.fused_apply_rotary_pos_emb is apply_rotary
