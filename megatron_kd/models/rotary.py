"""Rotary position embedding in three passes over its input, where Transformer Engine's fused kernel is not installed.

Megatron-Core's own unfused version takes a dozen passes and copies. It calls a kernel by the name
``fused_apply_rotary_pos_emb`` if the configuration says ``apply_rope_fusion``; on a CPU that name is given this one.
"""

import functools

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor


def provide_fused_rotary() -> None:
    """Give Megatron-Core :func:`apply_rotary` where it found no kernel of Transformer Engine."""
    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = apply_rotary


def apply_rotary(values: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate each pair (i, i + width / 2) of the last dimension by its angle (RoFormer, arXiv 2104.09864, eq. 34).

    Args:
        values: [sequence, batch, heads, width].
        angles: [sequence, 1, 1, width] radians, the second half equal to the first.
        interleaved: must be False: pairs (2 i, 2 i + 1) are not what this rotates.
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
    """As :func:`apply_rotary`, by the angles of the positions from ``start`` to ``end``; no gradient.

    Args:
        angles: of all positions, always the same object, so that their cosines are computed once.
    """
    cosine, sine = _cosine_and_sine(angles, values.dtype)
    return _rotate(values, cosine[start:end], sine[start:end], 1.0)


@functools.lru_cache(maxsize=4)
def _cosine_and_sine(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the whole width and of half of it. All layers give the same ``angles`` object, which is what the cache asks
    for: a tensor is equal to a key only if it is that key."""
    return angles.cos().to(dtype), angles.sin().to(dtype).chunk(2, dim=-1)[0]


class _Rotation(torch.autograd.Function):
    """The backward pass is the rotation by the opposite angle."""

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
