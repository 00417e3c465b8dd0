"""RMSNorm, SwiGLU and the rotation against torch's, Megatron-Core's and their formulas: values and gradients."""

import pytest
import torch

from megatron_kd.models.gpt import transformer_config
from megatron_kd.models.local_modules import RMSNorm, SwiGLU, _SwiGLUFunction, apply_rotary
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model


def config(precision, **parallel):
    world = parallel.get("tensor_model_parallel_size", 1)
    layout = ParallelLayout.for_world(ParallelConfig(**parallel), world)
    return transformer_config(TINY, layout, precision=precision, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 2e-2)]
)
def test_equals_torch_in_value_and_gradients(precision, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    ours = RMSNorm(config(precision), 48, eps=1e-3)
    reference = torch.nn.RMSNorm(48, eps=1e-3, dtype=torch.float64)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(48, generator=generator))
        reference.weight.copy_(ours.weight)
    rows = (torch.randn(5, 3, 48, generator=generator) * 4).to(dtype).requires_grad_()
    exact = rows.detach().double().requires_grad_()
    upstream = torch.randn(5, 3, 48, generator=generator).to(dtype)
    output, expected = ours(rows), reference(exact)
    output.backward(upstream)
    expected.backward(upstream.double())
    assert output.dtype == dtype and rows.grad.dtype == dtype
    for mine, theirs in ((output, expected), (rows.grad, exact.grad), (ours.weight.grad, reference.weight.grad)):
        assert (mine.double() - theirs).abs().max() < tolerance * theirs.abs().max()


def test_the_weight_says_when_its_gradient_is_a_partial_sum():
    assert RMSNorm(config("fp32"), 8).weight.sequence_parallel is False
    parts = RMSNorm(config("fp32", tensor_model_parallel_size=2, sequence_parallel=True), 8)
    assert parts.weight.sequence_parallel is True


def test_value_and_gradient():
    gate_and_up = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    gate, up = gate_and_up[..., :5], gate_and_up[..., 5:]
    assert torch.allclose(_SwiGLUFunction.apply(gate_and_up), gate * torch.sigmoid(gate) * up, rtol=1e-14)
    assert torch.autograd.gradcheck(_SwiGLUFunction.apply, (gate_and_up,))


def test_bf16_stays_bf16():
    gate_and_up = torch.randn(4, 1, 6, dtype=torch.bfloat16, requires_grad=True)
    output = _SwiGLUFunction.apply(gate_and_up)
    output.sum().backward()
    assert output.dtype == gate_and_up.grad.dtype == torch.bfloat16


def test_layers_on_a_cpu_use_it():
    with distributed_runtime():
        model = tiny_model(TINY)
    assert all(isinstance(layer.mlp.activation_func, SwiGLU) for layer in model.decoder.layers)


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
def test_other_rotations_are_refused(interleaved: bool, width: int) -> None:
    with pytest.raises(NotImplementedError, match="channels"):
        apply_rotary(torch.zeros(5, 1, 2, 4), angles(5, width), interleaved)


def test_a_model_on_a_cpu_calls_it() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    with distributed_runtime():
        assert tiny_model().config.apply_rope_fusion
    assert rope_utils.fused_apply_rotary_pos_emb is apply_rotary
