"""The activation of the local spec equals its formula, and the model is built with it."""

import torch

from megatron_kd.models.local_modules import SwiGLU, _SwiGLUFunction
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model


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
