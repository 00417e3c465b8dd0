"""A chunk of logits in blocks of neighbouring ids, and what each block holds of the distribution.

    logits [n, R] -> softmax in tiles of rows -> per block: its largest logit, its probability

Exponentials of a whole chunk are never kept: what is looked for later lies in few blocks, whose exponentials are made
again. R is this rank's part of the vocabulary, filled up to whole blocks with ``NO_LOGIT``.

The largest entries of long rows in blocks, over a vocabulary that may be split over ranks.

Draws from softmaxes over a vocabulary that may be split over ranks; a pure function of (seed, chunk, position).

Which ids a position draws depends neither on the batch that it is in nor on the layout (but for rounding at the edges
of an id's interval). The cumulative distribution is never written out: a draw first finds its block of ids by the
blocks' sums, then its id inside the block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.data.random_numbers import mix64, mix_int
from megatron_kd.losses.tile_buffers import Workspace
from megatron_kd.losses.tile_terms import row_blocks
from megatron_kd.parallel.groups import sum_over_group

BLOCK = 128
NO_LOGIT = -1.0e30  # finite, so that a rank of padding alone makes no NaN; its exponential is 0 beside any id's
CPU_TILE_ELEMENTS, CUDA_TILE_ELEMENTS = 1 << 20, 1 << 26  # numbers of a tile; on the CPU it stays in the cache


def blocks_of(columns: int) -> int:
    """Blocks that hold ``columns`` ids; one at least."""
    return max(1, -(-columns // BLOCK))


def take_blocks(values: Tensor, blocks: Tensor) -> Tensor:
    """[n, K, BLOCK] the blocks [n, K] of contiguous ``values`` [n, B, BLOCK]."""
    rows, count = values.shape[:2]
    first = torch.arange(0, rows * count, count, device=values.device).unsqueeze(1) if rows else blocks
    return values.flatten(0, 1).index_select(0, (blocks + first).flatten()).unflatten(0, blocks.shape)


@dataclass(frozen=True)
class LogitBlocks:
    """Logits of n tokens with their statistics.

    Attributes:
        logits: [n, B, BLOCK] contiguous.
        maxima: [n, B] the largest logit of each block.
        mass: [n, B] the probability of each block, of all ranks' ids.
        proposal_mass: [n, B] the same sum of probabilities to the power of ``proposal_exponent``.
        row_max: [n] the largest logit over all ranks.
        peak: fp64 [n], the probability of that logit.
        proposal_exponent: see ``proposal_mass``.
    """

    logits: Tensor
    maxima: Tensor
    mass: Tensor
    proposal_mass: Tensor
    row_max: Tensor
    peak: Tensor
    proposal_exponent: float

    def rows(self, rows: slice) -> "LogitBlocks":
        """Some of the tokens, without a copy."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)})

    def probabilities(self, blocks: Tensor) -> Tensor:
        """[n, K, BLOCK] fp32 probabilities of the ids of ``blocks`` [n, K]."""
        logits = take_blocks(self.logits, blocks)
        return logits.sub_(self.row_max.view(-1, 1, 1)).exp_().mul_(self.peak.to(logits.dtype).view(-1, 1, 1))

    def proposal(self, blocks: Tensor) -> Tensor:
        """[n, K, BLOCK] what draws are proportional to, in ``blocks`` [n, K]."""
        values = self.probabilities(blocks)
        return values if self.proposal_exponent == 1.0 else values.pow_(self.proposal_exponent)


def measure_blocks(logits: Tensor, workspace: Workspace, proposal_exponent: float = 1.0) -> LogitBlocks:
    """The statistics of ``logits`` [n, B * BLOCK], contiguous, as if this rank had the whole vocabulary.

    A row that is not finite has a ``peak`` that is not finite.
    """
    rows, columns = logits.shape
    blocks = logits.unflatten(1, (-1, BLOCK))
    maxima, mass = logits.new_empty(blocks.shape[:2]), logits.new_empty(blocks.shape[:2])
    proposal_mass = mass if proposal_exponent == 1.0 else torch.empty_like(mass)
    peak = logits.new_empty(rows, dtype=torch.float64)
    elements = CUDA_TILE_ELEMENTS if logits.is_cuda else CPU_TILE_ELEMENTS
    for tile in row_blocks(rows, columns, elements):
        shape = logits[tile].shape
        room = workspace.take("probabilities", tuple(shape), logits.dtype, logits.device)
        probabilities = torch.softmax(logits[tile], -1, out=room).unflatten(1, (-1, BLOCK))
        torch.sum(probabilities, -1, out=mass[tile])
        torch.amax(blocks[tile], -1, out=maxima[tile])
        best = maxima[tile].argmax(-1, keepdim=True)
        peak[tile] = take_blocks(probabilities, best).flatten(1).amax(-1)
        if proposal_exponent != 1.0:
            torch.sum(probabilities.pow_(proposal_exponent), -1, out=proposal_mass[tile])
    return LogitBlocks(blocks, maxima, mass, proposal_mass, maxima.amax(-1), peak, proposal_exponent)


def over_ranks(own: LogitBlocks, group: dist.ProcessGroup | None) -> LogitBlocks:
    """The same with probabilities of a vocabulary that is split over ``group``. Collective; scales masses in place."""
    if group is None or group.size() == 1:
        return own
    row_max = own.row_max.clone()
    dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=group)
    z = (own.row_max.double() - row_max.double()).exp() / own.peak  # this rank's exponentials, relative to row_max
    peak = 1 / sum_over_group(z.clone(), group)
    share = (z * peak).to(own.mass.dtype).unsqueeze(1)
    own.mass.mul_(share)
    if own.proposal_exponent != 1.0:
        own.proposal_mass.mul_(share.pow(own.proposal_exponent))
    return replace(own, row_max=row_max, peak=peak)


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
