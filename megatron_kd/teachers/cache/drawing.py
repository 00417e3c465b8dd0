"""Draws from softmaxes over a vocabulary that may be split over ranks; a pure function of (seed, chunk, position).

Which ids a position draws depends neither on the batch that it is in nor on the layout (but for rounding at the edges
of an id's interval). The cumulative distribution is never written out: a draw first finds its block of ids by the
blocks' sums, then its id inside the block.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.data.mixing import mix64, mix_int
from megatron_kd.teachers.cache.blocks import BLOCK


def uniform_numbers(seed: int, chunk_ids: np.ndarray, positions: np.ndarray, draws: int) -> np.ndarray:
    """float64 [T, draws] in [0, 1), made from the seed, each position's root chunk id and its place in the chunk."""
    keys = mix64(chunk_ids.astype(np.uint64) ^ np.uint64(mix_int(seed)))
    keys = mix64(keys + positions.astype(np.uint64))
    numbers = mix64(keys[:, None] + np.arange(draws, dtype=np.uint64))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(
    masses: Tensor,
    weights_of: Callable[[Tensor], Tensor],
    uniforms: Tensor,
    first_id: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Draw ids with probabilities proportional to weights. Collective over ``group``.

    Args:
        masses: [n, B] >= 0, sums of the weights of this rank's blocks.
        weights_of: gives the weights [n, N, BLOCK] of blocks [n, N].
        uniforms: float64 [n, N] in [0, 1), the same on every rank.
        first_id: id of this rank's first column.

    Returns:
        ids int64 [n, N], and [n] the sum of the weights over all ranks; the same on every rank.
    """
    cumulative = masses.double().cumsum(-1)
    own = cumulative[:, -1]
    before, upto, totals = _intervals(own, group)
    wanted = uniforms * totals.unsqueeze(1)
    mine = (wanted >= before.unsqueeze(1)) & (wanted < upto.unsqueeze(1))
    below_own = torch.nextafter(own, torch.zeros_like(own)).unsqueeze(1)
    targets = torch.minimum((wanted - before.unsqueeze(1)).clamp_min_(0.0), below_own)
    ids = torch.where(mine, _find(cumulative, weights_of, targets) + first_id, 0)
    if group is not None and group.size() > 1:
        dist.all_reduce(ids, group=group)
    return ids, totals


def _find(cumulative: Tensor, weights_of: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """Columns int64 [n, N] at which the cumulative weights pass ``targets``; any valid column for those outside."""
    blocks = torch.searchsorted(cumulative, targets.contiguous(), right=True).clamp_(max=cumulative.shape[1] - 1)
    below = torch.where(blocks > 0, cumulative.gather(-1, (blocks - 1).clamp_min(0)), 0.0)
    inner = weights_of(blocks).cumsum(-1)
    rest = (targets - below).to(inner.dtype).clamp_min_(0.0)
    rest = torch.minimum(rest, torch.nextafter(inner[..., -1], inner.new_zeros(())))  # never behind the last weight
    offset = torch.searchsorted(inner, rest.unsqueeze(-1), right=True).squeeze(-1)
    return blocks * BLOCK + offset.clamp_(max=BLOCK - 1)


def _intervals(own: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """[n] each: where this rank's part of the cumulative weights begins and ends, and the sum over all ranks.

    The parts meet exactly; the last one has no end, so that every number belongs to one rank whatever the rounding.
    """
    endless = torch.full_like(own, torch.inf)
    if group is None or group.size() == 1:
        return torch.zeros_like(own), endless, own
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    ends = torch.stack(parts).cumsum(0)
    rank = group.rank()
    before = ends[rank - 1] if rank else torch.zeros_like(own)
    last = int(torch.stack(parts).gt(0).any(1).nonzero().max()) if len(own) else 0  # ranks of padding alone draw none
    return before, endless if rank == last else ends[rank], ends[-1]
