"""A head applied to a chunk of hidden states, in buffers that are reused from chunk to chunk.

The matrix product runs in the head's dtype; all that follows is fp32 (fp64 for fp64 heads). For a 16-bit head on CPU
the product is 16-bit too, as in the model itself, and is widened block by block; on CUDA it is written in fp32.

The byte budget of a call is everything that grows with C or R beside inputs, gradients and rows of n numbers. A quarter
of it, at most 32 MiB, is for temporaries (of the divergence, and of the weight gradient of 16-bit weights); the rest is
for chunks, whose bytes for each of the C * R logits :func:`bytes_per_logit` counts:

    fp32                            4 (student) + 4 (teacher)
    16-bit, one rank on CPU         2 + 2, widened tile by tile
    16-bit, several ranks or CUDA   4 + 4, and 2 for the product or the gradient in 16 bits
    16-bit, Triton, plain heads     2 + 2, read and written by the kernels (scale, bias and softcap need 4 + 4 + 2)

One token a chunk is the least, whatever the budget.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.types import OutputHead

MOST_TEMPORARIES = 8  # tiles that are alive at a time in the divergence with the most of them, a mixture
LARGEST_TILE = 1 << 20  # numbers; beyond, a tile leaves the processor's cache
MATMUL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOGIT_FLOOR = -1.0e5  # what a bias of -inf makes of a logit: its probability is exactly 0, and 0 * LOGIT_FLOOR is 0


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and statistics for a head of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether logits are widened from this dtype."""
    return dtype in (torch.bfloat16, torch.float16)


def widens_by_block(weight: Tensor, tensor_parallel_size: int) -> bool:
    """Whether a chunk is kept in 16 bits and widened block by block."""
    return is_narrow(weight.dtype) and tensor_parallel_size == 1 and weight.device.type == "cpu"


def bytes_per_logit(weight_dtype: torch.dtype, chunk_dtype: torch.dtype, models: int) -> int:
    """Bytes of chunk buffers for each (token, row of this rank), all models together."""
    return chunk_dtype.itemsize * models + (weight_dtype.itemsize if chunk_dtype != weight_dtype else 0)


@dataclass(frozen=True)
class ChunkPlan:
    """How a byte budget is used: ``tokens`` a chunk, temporaries of ``tile_elements``, ``temporary_bytes`` in all."""

    tokens: int
    tile_elements: int
    temporary_bytes: int

    @staticmethod
    def of(budget: int, tokens: int, rows: int, number_bytes: int, logit_bytes: int) -> "ChunkPlan":
        """``rows`` are the padded ones of the student's weight, so that all ranks plan alike.

        ``number_bytes`` of a number in temporaries, ``logit_bytes`` of :func:`bytes_per_logit`.
        """
        temporary = min(budget // 4, MOST_TEMPORARIES * LARGEST_TILE * number_bytes)
        longest = max(1, (budget - temporary) // max(1, logit_bytes * rows))
        chunks = max(1, -(-tokens // longest))
        return ChunkPlan(
            tokens=max(1, -(-tokens // chunks)),  # spread evenly
            tile_elements=max(1, temporary // (MOST_TEMPORARIES * number_bytes)),
            temporary_bytes=temporary,
        )


class HeadLogits:
    """The columns ``first_row .. first_row + rows - 1`` of a head, for chunk after chunk."""

    def __init__(self, head: OutputHead, first_row: int, rows: int) -> None:
        if head.weight.dtype not in MATMUL_DTYPES:
            raise ConfigError(f"an output head's weight must be floating point, not {head.weight.dtype}")
        self.weight = head.weight.detach()[first_row : first_row + rows]
        self.bias = None if head.bias is None else head.bias.detach()[first_row : first_row + rows]
        self.scale = head.scale
        self.softcap = head.final_softcap

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """``out`` [n, R] = hidden [n, h] @ weight.T, in out's dtype."""
        if out.dtype == self.weight.dtype:
            torch.mm(hidden, self.weight.t(), out=out)
        elif out.device.type == "cuda":
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            out.copy_(torch.mm(hidden, self.weight.t()))

    def finish(self, logits: Tensor) -> None:
        """Scale, bias and softcap of ``logits`` [n, R], in place."""
        if self.bias is not None:
            logits.add_(self.bias).clamp_min_(LOGIT_FLOOR)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
