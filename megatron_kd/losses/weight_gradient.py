"""The gradient of an output weight, accumulated tile by tile where Megatron-Core's data parallelism expects it.

A parameter under Megatron-Core's DDP has ``main_grad``, a view of its gradient buffer. Tiles are added to it at once,
in its own dtype (fp32 as a rule), and ``backward`` then says so with ``grad_added_to_main_grad`` and hands autograd a
dummy that makes DDP's hook fire. Other parameters get an ordinary gradient.

Tied embeddings on one pipeline stage (``zero_out_wgrad``): the embedding delivers its own gradient to the same
parameter and fires the hook; DDP adds what arrives to ``main_grad``, so a dummy would be added too and nothing is
returned here. On the last of several stages the copy of the embedding is a parameter like any other.

For 16-bit weights a product is formed in blocks of the vocabulary, so that no [R, h] temporary exists beside
``main_grad``, or by the kernel ``fused_weight_gradient_mlp_cuda`` where it is installed. No collectives.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

from megatron_kd.losses.tile_buffers import allocate, is_narrow, work_dtype


@functools.cache
def fused_kernel() -> ModuleType | None:
    """Return Apex's fused accumulation kernel, or None where it is not installed."""
    try:
        import fused_weight_gradient_mlp_cuda
    except ImportError:
        return None
    return fused_weight_gradient_mlp_cuda


def main_grad(weight: Tensor) -> Tensor | None:
    """Return the gradient buffer that Megatron-Core's DDP gave a parameter, or None."""
    return getattr(weight, "main_grad", None)


class WeightGradient:
    """Accumulates ``gradient.T @ hidden`` over tiles for the first ``rows`` rows of ``weight``.

    A product that cannot be added in one call is formed in blocks of at most ``block_bytes``.
    """

    def __init__(self, weight: Tensor, rows: int, block_bytes: int) -> None:
        self.weight = weight
        self.rows = rows
        self.block_bytes = block_bytes
        buffer = main_grad(weight)
        self.into_main_grad = buffer is not None
        if buffer is None:
            buffer = allocate(weight.shape, work_dtype(weight.dtype), weight.device, zero=True)
        self._sum = buffer

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add a tile: ``gradient`` [n, rows] with respect to the matrix product's result, ``hidden`` [n, h]."""
        total = self._sum[: self.rows]
        kernel = fused_kernel() if gradient.is_cuda else None
        if total.dtype == gradient.dtype:
            total.addmm_(gradient.t(), hidden)
        elif kernel is not None and total.dtype == torch.float32:
            kernel.wgrad_gemm_accum_fp32(hidden, gradient.contiguous(), total)
        else:
            self._add_in_blocks(total, gradient, hidden)

    def deliver(self, factor: Tensor) -> Tensor | None:
        """Return the weight's gradient for autograd: the sum times ``factor``, a dummy, or nothing. Call it once."""
        if not self.into_main_grad:
            return self._sum.mul_(factor).to(self.weight.dtype)
        if not hasattr(self.weight, "grad_added_to_main_grad") or getattr(self.weight, "zero_out_wgrad", False):
            return None
        self.weight.grad_added_to_main_grad = True
        return torch.empty_like(self.weight)  # never read; autograd keeps it without a copy and the hook drops it

    def _add_in_blocks(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        widened = gradient.is_cuda and is_narrow(gradient.dtype) and total.dtype == torch.float32
        # otherwise the addition makes a copy of the product in its own dtype
        number_bytes = total.itemsize + (0 if widened else gradient.itemsize)
        step = max(1, self.block_bytes // (number_bytes * hidden.shape[1]))
        for start in range(0, total.shape[0], step):
            columns = gradient[:, start : start + step].t()
            product = torch.mm(columns, hidden, out_dtype=torch.float32) if widened else torch.mm(columns, hidden)
            total[start : start + step].add_(product)


def run_forward_pre_hooks(module: torch.nn.Module) -> None:
    """Wait for parameters that are gathered by hooks on ``module``'s forward (DDP's ``overlap_param_gather``).

    The loss reads an output layer's weight without calling the layer, so its hook does not run by itself: call this
    once per micro-batch, before the loss. Does nothing where there are no hooks.
    """
    for hook in tuple(module._forward_pre_hooks.values()):
        hook(module, ())
