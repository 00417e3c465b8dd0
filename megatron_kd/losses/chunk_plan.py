"""How a byte budget is used: how many tokens make a chunk, in which dtype it is kept, how large temporaries may be.

The byte budget of a call is everything that grows with C or R beside inputs, gradients and rows of n numbers. A quarter
of it, at most 32 MiB, is for temporaries (of the divergence, and of the weight gradient of 16-bit weights); the rest is
for chunks, whose bytes for each of the C * R logits :func:`bytes_per_logit` counts:

    fp32                            4 (student) + 4 (teacher)
    16-bit, one rank on CPU         2 + 2, widened tile by tile
    16-bit, several ranks or CUDA   4 + 4, and 2 for the product or the gradient in 16 bits
    16-bit, Triton, plain heads     2 + 2, read and written by the kernels (scale, bias and softcap need 4 + 4 + 2)
    heads of different dtypes       4 + 4 (8 + 8 if one is fp64), and those of the wider product or gradient in its own

One token a chunk is the least, whatever the budget. No collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_kd.losses.logits import is_narrow, work_dtype

MOST_TEMPORARIES = 8  # tiles that are alive at a time in the divergence with the most of them, a mixture
LARGEST_TILE = 1 << 20  # numbers; beyond, a tile leaves the processor's cache


@dataclass(frozen=True)
class ChunkDtypes:
    """``stored``: of the chunk's logits; ``evaluated``: of the rows that a divergence sees, a tile at a time if it is
    wider."""

    stored: torch.dtype
    evaluated: torch.dtype

    @staticmethod
    def of(weights: Sequence[torch.dtype], *, kernels_read_narrow: bool, widens_by_tile: bool) -> "ChunkDtypes":
        """For the heads' ``weights``.

        Args:
            kernels_read_narrow: kernels take 16-bit logits as they are.
            widens_by_tile: 16-bit logits may be widened tile by tile (one rank on a CPU).
        """
        if len(set(weights)) == 1 and is_narrow(weights[0]):
            if kernels_read_narrow:
                return ChunkDtypes(weights[0], weights[0])
            if widens_by_tile:
                return ChunkDtypes(weights[0], torch.float32)
        wide = torch.float64 if torch.float64 in weights else work_dtype(weights[0])
        return ChunkDtypes(wide, wide)

    @property
    def by_tile(self) -> bool:
        """Whether a chunk's logits are widened tile by tile."""
        return self.stored != self.evaluated


def bytes_per_logit(weights: Sequence[torch.dtype], stored: torch.dtype) -> int:
    """Bytes of chunk buffers for each (token, row of this rank), all models together, ``weights`` being their dtypes.

    One product or gradient in a weight's own dtype is alive beside the chunk where that is another.
    """
    own = max((weight.itemsize for weight in weights if weight != stored), default=0)
    return stored.itemsize * len(weights) + own


@dataclass(frozen=True)
class ChunkPlan:
    """``tokens`` a chunk, temporaries of ``tile_elements`` numbers, ``temporary_bytes`` in all."""

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
