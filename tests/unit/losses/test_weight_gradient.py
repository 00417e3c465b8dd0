"""Where the weight's gradient goes: main_grad, a dummy, or autograd; in every dtype, in blocks or at once."""

from types import SimpleNamespace

import pytest
import torch

from megatron_kd.losses import weight_gradient
from megatron_kd.losses.weight_gradient import WeightGradient, run_forward_pre_hooks

ROWS, VALID, HIDDEN, TOKENS = 20, 17, 8, 11


def tile(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(TOKENS, VALID, generator=generator).to(dtype)
    return gradient, torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)


def parameter(dtype: torch.dtype, main_grad: torch.dtype | None) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.zeros(ROWS, HIDDEN, dtype=dtype))
    if main_grad is not None:
        weight.main_grad = torch.ones(ROWS, HIDDEN, dtype=main_grad)
    return weight


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "main_grad", "tolerance"),
    [(torch.float32, torch.float32, 1e-6), (torch.bfloat16, torch.float32, 1e-2),
     (torch.bfloat16, torch.bfloat16, 3e-2), (torch.float64, torch.float64, 1e-12)],
)  # fmt: skip
def test_tiles_are_added_to_main_grad(dtype, main_grad, tolerance, block_bytes):
    weight = parameter(dtype, main_grad)
    gradient, hidden = tile(dtype)
    accumulated = WeightGradient(weight, VALID, block_bytes)
    accumulated.add(gradient, hidden)
    accumulated.add(gradient, hidden)
    expected = 1 + 2 * gradient.double().t() @ hidden.double()
    error = (weight.main_grad[:VALID].double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance
    assert (weight.main_grad[VALID:] == 1).all()


def test_a_ddp_parameter_gets_a_mark_and_a_dummy():
    weight = parameter(torch.float32, torch.float32)
    weight.grad_added_to_main_grad = False
    dummy = WeightGradient(weight, VALID, 1 << 20).deliver(torch.tensor(1.0))
    assert weight.grad_added_to_main_grad is True
    assert dummy.shape == weight.shape and dummy.dtype == weight.dtype


@pytest.mark.parametrize("attribute", ["zero_out_wgrad", None])
def test_a_tied_or_unwrapped_parameter_gets_neither(attribute):
    weight = parameter(torch.float32, torch.float32)
    if attribute:
        weight.grad_added_to_main_grad = False
        weight.zero_out_wgrad = True
    assert WeightGradient(weight, VALID, 1 << 20).deliver(torch.tensor(1.0)) is None
    assert not getattr(weight, "grad_added_to_main_grad", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ordinary_parameter_gets_its_gradient_in_its_dtype(dtype):
    weight = parameter(dtype, None)
    gradient, hidden = tile(dtype)
    accumulated = WeightGradient(weight, VALID, 1 << 20)
    accumulated.add(gradient, hidden)
    delivered = accumulated.deliver(torch.tensor(3.0))
    assert delivered.dtype == dtype and not delivered[VALID:].any()
    expected = 3 * gradient.double().t() @ hidden.double()
    assert (delivered[:VALID].double() - expected).abs().max() <= expected.abs().max() * (
        1e-6 if dtype == torch.float32 else 1e-2
    )


def test_the_fused_kernel_is_called_as_megatron_core_calls_it(monkeypatch):
    calls = []
    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=lambda x, g, total: calls.append((x.shape, g.shape, total.shape)))
    monkeypatch.setattr(weight_gradient, "fused_kernel", lambda: kernel)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    gradient, hidden = tile(torch.bfloat16)
    WeightGradient(parameter(torch.bfloat16, torch.float32), VALID, 1 << 20).add(gradient, hidden)
    assert calls == [((TOKENS, HIDDEN), (TOKENS, VALID), (VALID, HIDDEN))]


def test_forward_pre_hooks_run_without_the_forward():
    seen = []
    layer = torch.nn.Linear(2, 2)
    run_forward_pre_hooks(layer)
    layer.register_forward_pre_hook(lambda module, arguments: seen.append(module))
    run_forward_pre_hooks(layer)
    assert seen == [layer]
