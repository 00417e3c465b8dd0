"""RMSNorm against torch's: values and both gradients."""

import pytest
import torch

from megatron_kd.models.gpt import transformer_config
from megatron_kd.models.local_modules import RMSNorm
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from tests.reference.one_rank import TINY


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
