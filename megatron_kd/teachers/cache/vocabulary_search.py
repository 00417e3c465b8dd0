"""Find ids in softmaxes over a large vocabulary, possibly split over ranks, without ever keeping all probabilities.

    logits [n, R] -> softmax in tiles of rows -> per block of 128 ids: its largest logit, its probability

R is this rank's part of the vocabulary, padded to whole blocks with ``NO_LOGIT``. All logits are read once; what is
looked for later lies in few blocks, whose exponentials are computed again. The largest ids lie in the blocks with the
largest logits. A draw first finds its block by the blocks' probabilities, then its id inside the block, so the
cumulative distribution is never written out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.data.random_numbers import hash64, hash_int
from megatron_kd.losses.tile_buffers import Workspace
from megatron_kd.losses.tile_terms import local_columns, row_blocks
from megatron_kd.parallel.groups import sum_over_group

BLOCK = 128
SUBBLOCK = 16
NO_LOGIT = -1.0e30  # finite, so that a rank of padding alone makes no NaN; its exponential is 0 beside any id's
CPU_TILE_ELEMENTS, CUDA_TILE_ELEMENTS = 1 << 20, 1 << 26  # numbers in a tile; on the CPU it stays in the cache


def blocks_of(columns: int) -> int:
    """Return how many blocks hold ``columns`` ids, at least one."""
    return max(1, -(-columns // BLOCK))


def take_blocks(values: Tensor, blocks: Tensor) -> Tensor:
    """Gather the blocks numbered ``blocks`` [n, K] of contiguous ``values`` [n, B, BLOCK]: [n, K, BLOCK]."""
    rows, count = values.shape[:2]
    first = torch.arange(0, rows * count, count, device=values.device).unsqueeze(1) if rows else blocks
    return values.flatten(0, 1).index_select(0, (blocks + first).flatten()).unflatten(0, blocks.shape)


@dataclass(frozen=True)
class BlockedSoftmax:
    """The distributions of n tokens, softmax(logits), with what each block of ids holds of them.

    Attributes:
        logits: [n, B, BLOCK] contiguous, this rank's ids.
        maxima: [n, B], the largest logit of each block.
        mass: [n, B], the probability of each block.
        proposal_mass: [n, B], the block's sum of probability ** ``proposal_exponent``.
        row_max: [n], the largest logit over all ranks.
        peak: fp64 [n], the probability of that logit; not finite for a row with a logit that is not.
        proposal_exponent: what ids are drawn from is probability ** this.
        first_id: id of this rank's first column.
        num_ids: this rank's columns without padding.
        group: the ranks over which the vocabulary is split; None for one.
    """

    logits: Tensor
    maxima: Tensor
    mass: Tensor
    proposal_mass: Tensor
    row_max: Tensor
    peak: Tensor
    proposal_exponent: float
    first_id: int
    num_ids: int
    group: dist.ProcessGroup | None

    @classmethod
    def measure(
        cls,
        logits: Tensor,
        workspace: Workspace,
        proposal_exponent: float = 1.0,
        *,
        first_id: int = 0,
        num_ids: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> "BlockedSoftmax":
        """Read ``logits`` [n, B * BLOCK], contiguous, once. Collective over ``group``.

        Args:
            workspace: where the tiles of probabilities go.
            num_ids: columns that are not padding; None for all.
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
        num_ids = columns if num_ids is None else num_ids
        own = cls(
            blocks, maxima, mass, proposal_mass, maxima.amax(-1), peak, proposal_exponent, first_id, num_ids, group
        )
        return own._normalised_over_ranks()

    def rows(self, rows: slice) -> "BlockedSoftmax":
        """Return some of the tokens, without a copy."""
        return replace(
            self,
            logits=self.logits[rows],
            maxima=self.maxima[rows],
            mass=self.mass[rows],
            proposal_mass=self.proposal_mass[rows],
            row_max=self.row_max[rows],
            peak=self.peak[rows],
        )

    def probabilities(self, blocks: Tensor) -> Tensor:
        """Return the probabilities, [n, K, BLOCK] fp32, of the ids of this rank's ``blocks`` [n, K]."""
        logits = take_blocks(self.logits, blocks)
        return logits.sub_(self.row_max.view(-1, 1, 1)).exp_().mul_(self.peak.to(logits.dtype).view(-1, 1, 1))

    def proposal(self, blocks: Tensor) -> Tensor:
        """Return what draws are proportional to, [n, K, BLOCK], in this rank's ``blocks`` [n, K]."""
        values = self.probabilities(blocks)
        return values if self.proposal_exponent == 1.0 else values.pow_(self.proposal_exponent)

    def top_k(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the ``count`` most probable ids of each token: probabilities fp64 [n, count], falling, and ids.

        The same on every rank. Collective.
        """
        logits, ids = top_k_over_ranks(self.logits, self.maxima, self.first_id, count, self.group)
        return (logits - self.row_max.unsqueeze(1)).double().exp_().mul_(self.peak.unsqueeze(1)), ids

    def sample(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Draw ids, int64 [n, N], from probability ** ``proposal_exponent``; also return its sum over all ids, [n].

        The same on every rank. Collective.

        Args:
            uniforms: float64 [n, N] in [0, 1), the same on every rank.
        """
        return sample(self.proposal_mass, self.proposal, uniforms, self.first_id, self.group)

    def probabilities_of(self, ids: Tensor) -> Tensor:
        """Return the probabilities, fp64 [n, N], of ``ids`` [n, N] of any rank. Collective."""
        columns, owned = local_columns(ids, self.first_id, self.num_ids)
        relative = self.logits.flatten(1).gather(1, columns) - self.row_max.unsqueeze(1)
        return self._sum_over_ranks(torch.where(owned, relative.double().exp_() * self.peak.unsqueeze(1), 0.0))

    def take_mass_outside(self, ids: Tensor) -> Tensor:
        """Return the probability, fp64 [n], of all ids but ``ids`` [n, N], whose logits are overwritten. Collective.

        It is summed, not 1 minus the others', so a small tail keeps its digits. fp32 inside a block is exact enough.
        """
        columns, owned = local_columns(ids, self.first_id, self.num_ids)
        nothing_where_owned = torch.where(owned, NO_LOGIT, torch.inf).to(self.logits.dtype)
        self.logits.flatten(1).scatter_reduce_(-1, columns, nothing_where_owned, "amin")
        changed = columns // BLOCK
        mass = self.mass.scatter(-1, changed, self.probabilities(changed).sum(-1))
        return self._sum_over_ranks(mass.sum(-1, dtype=torch.float64))

    def _normalised_over_ranks(self) -> "BlockedSoftmax":
        """Turn softmaxes over each rank's own ids into one over all ids. Collective; scales the masses in place."""
        if self.group is None or self.group.size() == 1:
            return self
        row_max = self.row_max.clone()
        dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=self.group)
        z = (self.row_max.double() - row_max.double()).exp() / self.peak  # this rank's exponentials, over row_max's
        peak = 1 / sum_over_group(z.clone(), self.group)
        share = (z * peak).to(self.mass.dtype).unsqueeze(1)
        self.mass.mul_(share)
        if self.proposal_exponent != 1.0:
            self.proposal_mass.mul_(share.pow(self.proposal_exponent))
        return replace(self, row_max=row_max, peak=peak)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return values if self.group is None else sum_over_group(values, self.group)


def top_k(values: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest values of every row, falling, and their columns, [n, count] each. Exact.

    They lie in the blocks with the largest maxima, and there in the sub-blocks with the largest maxima, so only as many
    blocks and sub-blocks as entries are searched.

    Args:
        values: [n, B, BLOCK], contiguous, B * BLOCK >= count.
        maxima: [n, B], the largest value of each block.
    """
    columns = torch.arange(maxima.shape[1], device=values.device).expand_as(maxima) * BLOCK
    if maxima.shape[1] > count:
        blocks = torch.topk(maxima, count, dim=-1, sorted=False).indices
        columns, values = blocks * BLOCK, take_blocks(values, blocks)
    subblocks = values.unflatten(-1, (-1, SUBBLOCK)).flatten(1, 2)  # [n, P, SUBBLOCK]
    best = torch.topk(subblocks.amax(-1), min(count, subblocks.shape[1]), dim=-1, sorted=False).indices
    starts = columns.gather(-1, best // (BLOCK // SUBBLOCK)) + best % (BLOCK // SUBBLOCK) * SUBBLOCK
    candidates = subblocks.gather(1, best.unsqueeze(-1).expand(-1, -1, SUBBLOCK)).flatten(1)
    found = torch.topk(candidates, count, dim=-1)
    return found.values, starts.gather(-1, found.indices // SUBBLOCK) + found.indices % SUBBLOCK


def top_k_over_ranks(
    values: Tensor, maxima: Tensor, first_id: int, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest values of rows that are split over a group, and their ids, the same on every rank.

    Args:
        values, maxima: this rank's blocks as in :func:`top_k`; all ranks together have at least ``count`` ids.
        first_id: id of column 0.
    """
    own = min(count, values.shape[1] * BLOCK)
    best, columns = top_k(values, maxima, own)
    if group is None or group.size() == 1:
        return best, columns + first_id
    found, ids = values.new_full((len(values), count), NO_LOGIT), columns.new_zeros((len(values), count))
    found[:, :own], ids[:, :own] = best, columns + first_id
    all_found, all_ids = _gather(found, group), _gather(ids, group)
    chosen = torch.topk(all_found, count, dim=-1)
    return chosen.values, all_ids.gather(-1, chosen.indices)


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate [n, c] of every rank to [n, ranks * c]."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def uniform_numbers(seed: int, chunk_ids: np.ndarray, positions: np.ndarray, draws: int) -> np.ndarray:
    """Return float64 [T, draws] in [0, 1), a function of the seed, each token's root chunk id and place in the chunk.

    So what a token draws depends neither on the batch that it is in nor on the layout.
    """
    keys = hash64(chunk_ids.astype(np.uint64) ^ np.uint64(hash_int(seed)))
    keys = hash64(keys + positions.astype(np.uint64))
    numbers = hash64(keys[:, None] + np.arange(draws, dtype=np.uint64))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(
    masses: Tensor,
    weights_of: Callable[[Tensor], Tensor],
    uniforms: Tensor,
    first_id: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Draw ids with probabilities proportional to weights, with replacement. Collective over ``group``.

    Another layout draws the same ids but for rounding at the edges of an id's interval.

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
    ids = torch.where(mine, _invert_cumulative(cumulative, weights_of, targets) + first_id, 0)
    if group is not None and group.size() > 1:
        dist.all_reduce(ids, group=group)
    return ids, totals


def _invert_cumulative(cumulative: Tensor, weights_of: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """Return the columns, int64 [n, N], at which the cumulative weights pass ``targets``, or any valid column."""
    blocks = torch.searchsorted(cumulative, targets.contiguous(), right=True).clamp_(max=cumulative.shape[1] - 1)
    below = torch.where(blocks > 0, cumulative.gather(-1, (blocks - 1).clamp_min(0)), 0.0)
    inner = weights_of(blocks).cumsum(-1)
    rest = (targets - below).to(inner.dtype).clamp_min_(0.0)
    rest = torch.minimum(rest, torch.nextafter(inner[..., -1], inner.new_zeros(())))  # never behind the last weight
    offset = torch.searchsorted(inner, rest.unsqueeze(-1), right=True).squeeze(-1)
    return blocks * BLOCK + offset.clamp_(max=BLOCK - 1)


def _intervals(own: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return where this rank's part of the cumulative weights begins and ends, and the sum over all ranks, [n] each.

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
