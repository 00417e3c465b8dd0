"""A chunk of logits in blocks of neighbouring ids, and what each block holds of the distribution.

    logits [n, R] -> softmax in tiles of rows -> per block: its largest logit, its probability

Exponentials of a whole chunk are never kept: what is looked for later lies in few blocks, whose exponentials are made
again. R is this rank's part of the vocabulary, filled up to whole blocks with ``NO_LOGIT``.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.losses.buffers import Workspace
from megatron_kd.losses.chunk_terms import row_tiles
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
    for tile in row_tiles(rows, columns, elements):
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
