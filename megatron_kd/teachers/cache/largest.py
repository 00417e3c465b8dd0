"""The largest entries of long rows, over a vocabulary that may be split over ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = 128


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of every row, falling: values and columns [n, count]. Exact.

    The largest entries lie in the blocks with the largest maxima, so only that many blocks are searched.

    Args:
        values: [n, R], R >= count.
    """
    rows, columns = values.shape
    whole = columns // BLOCK
    if whole <= 2 * count:
        return torch.topk(values, count, dim=-1)
    maxima = values[:, : whole * BLOCK].unflatten(-1, (whole, BLOCK)).amax(-1)
    blocks = torch.topk(maxima, count, dim=-1).indices
    candidates = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    if columns % BLOCK:
        rest = torch.arange(whole * BLOCK, columns, device=values.device).expand(rows, -1)
        candidates = torch.cat([candidates, rest], dim=-1)
    found = torch.topk(values.gather(-1, candidates), count, dim=-1)
    return found.values, candidates.gather(-1, found.indices)


def largest_over_ranks(
    values: Tensor, first_id: int, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """:func:`largest` of rows whose columns are split over a group: values and global ids [n, count], on every rank.

    Args:
        values: [n, R], this rank's columns (R may be anything); all ranks together have at least ``count``.
        first_id: id of column 0.
    """
    size = 1 if group is None else group.size()
    if size == 1:
        found, columns = largest(values, count)
        return found, columns + first_id
    own = min(count, values.shape[1])
    found, ids = values.new_full((len(values), count), -1.0), values.new_zeros((len(values), count), dtype=torch.long)
    if own:
        found[:, :own], columns = largest(values, own)
        ids[:, :own] = columns + first_id
    all_found, all_ids = _gather(found, group), _gather(ids, group)
    best = torch.topk(all_found, count, dim=-1)
    return best.values, all_ids.gather(-1, best.indices)


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, c] of every rank to [n, ranks * c]."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
