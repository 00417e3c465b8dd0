"""The largest entries of long rows in blocks, over a vocabulary that may be split over ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.teachers.cache.blocks import BLOCK, NO_LOGIT, take_blocks

PIECE = 16  # of a block


def largest(values: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of every row, falling: values and columns [n, count]. Exact.

    They lie in the blocks with the largest maxima, and there in the pieces with the largest maxima; so only as many
    blocks and pieces as entries are searched.

    Args:
        values: [n, B, BLOCK], contiguous, B * BLOCK >= count.
        maxima: [n, B] of the blocks.
    """
    columns = torch.arange(maxima.shape[1], device=values.device).expand_as(maxima) * BLOCK
    if maxima.shape[1] > count:
        blocks = torch.topk(maxima, count, dim=-1, sorted=False).indices
        columns, values = blocks * BLOCK, take_blocks(values, blocks)
    pieces = values.unflatten(-1, (-1, PIECE)).flatten(1, 2)  # [n, P, PIECE]
    best = torch.topk(pieces.amax(-1), min(count, pieces.shape[1]), dim=-1, sorted=False).indices
    starts = columns.gather(-1, best // (BLOCK // PIECE)) + best % (BLOCK // PIECE) * PIECE
    candidates = pieces.gather(1, best.unsqueeze(-1).expand(-1, -1, PIECE)).flatten(1)
    found = torch.topk(candidates, count, dim=-1)
    return found.values, starts.gather(-1, found.indices // PIECE) + found.indices % PIECE


def largest_over_ranks(
    values: Tensor, maxima: Tensor, first_id: int, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """:func:`largest` of rows whose columns are split over a group: values and global ids [n, count], on every rank.

    Args:
        values, maxima: this rank's blocks; all ranks together have at least ``count`` ids.
        first_id: id of column 0.
    """
    own = min(count, values.shape[1] * BLOCK)
    best, columns = largest(values, maxima, own)
    if group is None or group.size() == 1:
        return best, columns + first_id
    found, ids = values.new_full((len(values), count), NO_LOGIT), columns.new_zeros((len(values), count))
    found[:, :own], ids[:, :own] = best, columns + first_id
    all_found, all_ids = _gather(found, group), _gather(ids, group)
    chosen = torch.topk(all_found, count, dim=-1)
    return chosen.values, all_ids.gather(-1, chosen.indices)


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, c] of every rank to [n, ranks * c]."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
