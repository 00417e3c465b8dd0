"""Modules of the local layer spec: RMSNorm, SwiGLU and rotary embedding that read their inputs few times.

Each has a backward pass of its own that keeps little. Megatron-Core's versions without Transformer Engine take many
passes and copies, and its norm refuses sequence parallelism (``parallel/mcore_patches/patch_table.py``).
"""

import functools

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension, with Megatron-Core's constructor arguments.

    Under sequence parallelism each rank normalises its slice of the sequence, so the weight's gradient is a partial
    sum: ``weight.sequence_parallel`` makes Megatron-Core sum it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron-Core's flag

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        if not torch.is_grad_enabled():
            return _normalize(hidden, self.weight, self.eps)[0]
        return _RMSNormFunction.apply(hidden, self.weight, self.eps)


def _normalize(hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the result and the inverse RMS of every row."""
    rows = hidden.float()
    inverse_rms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
    normalized = rows * inverse_rms
    result = normalized.mul_(weight) if hidden.dtype == torch.float32 else normalized.to(hidden.dtype) * weight
    return result, inverse_rms


class _RMSNormFunction(torch.autograd.Function):
    """Keeps the input and one scalar per row for the backward pass; arithmetic in fp32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, inverse_rms = _normalize(hidden, weight, eps)
        ctx.save_for_backward(hidden, weight, inverse_rms)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        # With g the upstream gradient, r the inverse RMS and p = g · x: r · g · w − x · r³ · mean(p · w), and Σ p · r.
        hidden, weight, inverse_rms = ctx.saved_tensors
        rows, upstream, scale, width = hidden.float(), gradient.float(), weight.float(), hidden.shape[-1]
        products = (upstream * rows).flatten(0, -2)
        weight_gradient = torch.mv(products.t(), inverse_rms.flatten())
        factor = torch.mv(products, scale).view(inverse_rms.shape).mul_(inverse_rms.pow(3)).div_(-width)
        hidden_gradient = (upstream * scale).mul_(inverse_rms).addcmul_(rows, factor)
        return hidden_gradient.to(hidden.dtype), weight_gradient.to(weight.dtype), None


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
        """Return an empty state: there are no weights, but Megatron-Core's MLP asks each of its parts."""
        return {}


class _SwiGLUFunction(torch.autograd.Function):
    """Keeps silu(gate) beside its input: computing it again costs more than reading it."""

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


def apply_rotary(values: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate each pair (i, i + width / 2) of the last dimension by its angle (RoFormer, arXiv 2104.09864, eq. 34).

    Args:
        values: [sequence, batch, heads, width].
        angles: [sequence, 1, 1, width] radians, the second half equal to the first.
        interleaved: must be False; True means pairs (2 i, 2 i + 1).

    Raises:
        NotImplementedError: pairs are interleaved, or only some channels are rotated.
    """
    if interleaved or angles.shape[-1] != values.shape[-1]:
        raise NotImplementedError(
            f"rotation of interleaved pairs or of {angles.shape[-1]} of {values.shape[-1]} channels"
        )
    cosine, sine = _cosine_and_sine(angles, values.dtype)
    if not torch.is_grad_enabled():
        return _rotate(values, cosine, sine, 1.0)
    return _Rotation.apply(values, cosine, sine)


def rotate(values: Tensor, angles: Tensor, start: int, end: int) -> Tensor:
    """Rotate by the angles of the positions from ``start`` to ``end``, without a gradient; see :func:`apply_rotary`.

    Args:
        angles: of all positions, always the same object, so that their cosines are computed once.
    """
    cosine, sine = _cosine_and_sine(angles, values.dtype)
    return _rotate(values, cosine[start:end], sine[start:end], 1.0)


@functools.lru_cache(maxsize=4)
def _cosine_and_sine(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines of the whole width and sines of half of it, which is enough.

    All layers pass the same ``angles`` object; a tensor hashes by identity, so the cache finds it.
    """
    return angles.cos().to(dtype), angles.sin().to(dtype).chunk(2, dim=-1)[0]


class _Rotation(torch.autograd.Function):
    """Rotation; its backward pass rotates by the opposite angle."""

    @staticmethod
    def forward(ctx, values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(values, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(gradient, cosine, sine, -1.0), None, None


def _rotate(values: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    first, second = values.chunk(2, dim=-1)
    rotated = values * cosine
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, sine, value=-direction)
    rotated_second.addcmul_(first, sine, value=direction)
    return rotated
