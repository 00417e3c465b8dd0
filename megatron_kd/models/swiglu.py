"""SwiGLU without copies of its halves, for the local layer spec.

Megatron-Core's unfused version adds an offset of zero in a pass of its own and joins the two halves' gradients in
another. It builds an activation module from the layer spec where the configuration says ``use_te_activation_func``,
which is how this one is put in its place.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SwiGLU(torch.nn.Module):
    """silu(gate) · up of ``[gate, up]``, the two halves of the last dimension (arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2 · ffn] -> [..., ffn]."""
        if not torch.is_grad_enabled():
            gate, up = gate_and_up.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate).mul_(up)
        return _SwiGLUFunction.apply(gate_and_up)

    def sharded_state_dict(self, *_: object, **__: object) -> dict[str, object]:
        """Nothing: there are no weights. Megatron-Core's MLP asks each of its parts."""
        return {}


class _SwiGLUFunction(torch.autograd.Function):
    """Keeps silu(gate) beside its input: an exponential costs more than reading it again."""

    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=up_gradient)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        return result
