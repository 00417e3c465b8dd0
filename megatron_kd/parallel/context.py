"""Context parallelism: which positions of a sequence are whose.

A sequence is cut into 2 C parts; rank r of C holds parts r and 2 C - 1 - r, one after the other, as Megatron-Core's
rotary embedding and Transformer Engine's attention have it. Under a causal mask every rank then has as much to do.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def part_numbers(size: int, rank: int) -> tuple[int, int]:
    """The two of 2 ``size`` parts that ``rank`` holds."""
    return rank, 2 * size - 1 - rank


def part_of(values: Tensor, size: int, rank: int, dimension: int = 0) -> Tensor:
    """What rank ``rank`` of ``size`` holds of whole sequences.

    Args:
        values: their positions along ``dimension``, a multiple of 2 ``size`` of them.
    """
    if size == 1:
        return values
    parts = values.chunk(2 * size, dim=dimension)
    return torch.cat([parts[number] for number in part_numbers(size, rank)], dim=dimension)


def own_part(values: Tensor, group: dist.ProcessGroup | None, dimension: int = 0) -> Tensor:
    """:func:`part_of` for this rank of a context-parallel group; None is no such group."""
    return values if group is None else part_of(values, group.size(), group.rank(), dimension)


def in_order(gathered: Tensor, size: int) -> Tensor:
    """Whole sequences from what all ranks hold, one rank after the other, along the first dimension."""
    parts = gathered.chunk(2 * size)
    place = {number: 2 * rank + half for rank in range(size) for half, number in enumerate(part_numbers(size, rank))}
    return torch.cat([parts[place[number]] for number in range(2 * size)])
