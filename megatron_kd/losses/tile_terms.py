"""What every way of evaluating a tile shares: its tensors, the labels' logits, row statistics, results.

A tile holds n tokens and this rank's R vocabulary ids. Statistics are rows [n] fp32; exponentials are taken relative
to this rank's maximum first and rescaled when the maximum over the ranks is known, so that a tile is read once
before its first collective.

The collectives of a tensor-parallel loss over an explicit process group; no group means one rank.

Every call is one collective of the group when it has more than one rank, and none otherwise.
"""

from dataclasses import dataclass
from typing import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.losses.types import DistillationObjective, SparseKnowledge

EMPTY_MAXIMUM = -1.0e30  # the maximum of no ids: finite, so that its difference to a real one is no NaN


@dataclass(frozen=True)
class Problem:
    """What is the same for all tiles of a call.

    Attributes:
        objective: weights, divergence, temperature.
        vocab_start: global id of this rank's first column.
        student_vocab_size: ids that the student's LM loss is normalised over.
        common_vocab_size: ids that both models have: the KD term is normalised over these.
        common_columns: how many of this rank's columns are common.
        head_scale, final_softcap: of the student's head; gradients are with respect to what the matrix product gave.
        gradient_scale: factor of all gradients.
    """

    objective: DistillationObjective
    vocab_start: int
    student_vocab_size: int
    common_vocab_size: int
    common_columns: int
    head_scale: float
    final_softcap: float | None
    gradient_scale: float

    @property
    def separate_lm(self) -> bool:
        """Whether LM and KD need two softmaxes of the student."""
        return self.objective.temperature != 1.0 or self.common_vocab_size != self.student_vocab_size


@dataclass
class Tile:
    """n tokens: ``student`` [n, R] and ``teacher`` [n, common columns] fp32 logits, which are overwritten.

    ``labels`` [n] int64 global ids, ``weights`` [n] fp32, ``sparse`` the rows of the sparse knowledge.
    """

    student: Tensor
    labels: Tensor
    weights: Tensor
    teacher: Tensor | None = None
    sparse: SparseKnowledge | None = None


@dataclass
class TokenLosses:
    """[n] fp32 values of a tile's tokens, not yet weighted."""

    lm: Tensor
    kd: Tensor | None = None
    entropy: Tensor | None = None


@dataclass
class LabelLogits:
    """Where this rank holds the label's column: ``column`` [n] (0 where it does not), ``owned`` [n] bool, its logit."""

    column: Tensor
    owned: Tensor
    logit: Tensor
    exists: Tensor  # [n] bool: the label is an id that the student has; otherwise its loss is +inf

    @staticmethod
    def of(tile: Tile, problem: Problem) -> "LabelLogits":
        column, owned = local_columns(tile.labels, problem.vocab_start, tile.student.shape[1])
        logit = gather_columns(tile.student, column.unsqueeze(1)).squeeze(1)
        exists = (tile.labels >= 0) & (tile.labels < problem.student_vocab_size)
        return LabelLogits(column, owned, logit, exists)

    def relative_to(self, maximum: Tensor) -> Tensor:
        """The label's logit minus ``maximum`` on the rank that has it, 0 on the others: to be summed over ranks."""
        return torch.where(self.owned, self.logit - maximum, 0.0)

    def loss(self, relative_logit: Tensor, log_z: Tensor) -> Tensor:
        """-log q(label) from sums over the ranks; +inf for an id that the student does not have."""
        return torch.where(self.exists, log_z - relative_logit, torch.inf)

    def subtract_one_hot(self, gradient: Tensor, coefficient: Tensor, rows: slice = slice(None)) -> None:
        """``gradient[label] -= coefficient`` for the tokens ``rows`` of the tile, in place."""
        if gradient.shape[1]:
            update = torch.where(self.owned[rows], -coefficient, 0.0)
            gradient.scatter_add_(1, self.column[rows].unsqueeze(1), update.unsqueeze(1))


def local_columns(ids: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """(column of each id on this rank, 0 where it has none; whether it has one)."""
    local = ids - vocab_start
    owned = (local >= 0) & (local < columns)
    return torch.where(owned, local, 0), owned


def gather_columns(values: Tensor, columns: Tensor) -> Tensor:
    """values [n, R] at columns [n, K]; zeros where R is 0."""
    if values.shape[1] == 0:
        return values.new_zeros(columns.shape)
    return values.gather(1, columns)


def row_max(values: Tensor) -> Tensor:
    """[n, R] -> [n]; a large negative number where R is 0."""
    if values.shape[1] == 0:
        return values.new_full(values.shape[:1], EMPTY_MAXIMUM)
    return values.amax(-1)


def row_blocks(rows: int, columns: int, block_elements: int) -> Iterator[slice]:
    """Slices of rows whose temporaries hold about ``block_elements`` numbers (one row at least)."""
    step = max(1, block_elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


@dataclass(frozen=True)
class TensorParallel:
    """Reductions over the tensor-parallel group. All results are equal on its ranks."""

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def max_(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks, in place: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in place: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def gather_sequence(self, hidden: Tensor) -> Tensor:
        """[s / TP, ...] of every rank to [s, ...] in rank order: one all-gather."""
        if self.size == 1:
            return hidden
        gathered = hidden.new_empty((hidden.shape[0] * self.size, *hidden.shape[1:]))
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=self.group)
        return gathered

    def scatter_sequence(self, gradient: Tensor) -> Tensor:
        """Sum of [s, ...] over the ranks, of which this rank keeps its [s / TP, ...]: one reduce-scatter."""
        if self.size == 1:
            return gradient
        scattered = gradient.new_empty((gradient.shape[0] // self.size, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(scattered, gradient.contiguous(), op=dist.ReduceOp.SUM, group=self.group)
        return scattered
