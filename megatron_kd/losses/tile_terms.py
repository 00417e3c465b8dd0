"""The terms in which both evaluators of a tile speak: the tile, its labels' logits, row statistics, reductions.

A tile holds n tokens and this rank's R vocabulary ids. Statistics are rows [n] fp32; exponentials are taken relative
to this rank's maximum first and rescaled when the maximum over the ranks is known, so that a tile is read once
before its first collective. Collectives are those of :class:`TensorParallel`, over an explicit process group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.losses.types import DenseKnowledge, DistillationObjective, OutputHead, SparseKnowledge

EMPTY_MAXIMUM = -1.0e30  # the maximum of no ids: finite, so that its difference to a real one is no NaN


@dataclass(frozen=True)
class Problem:
    """Everything that is the same for all tiles of a call.

    Attributes:
        objective: weights, divergence, temperature.
        vocab_start: global id of this rank's first column.
        student_vocab_size: number of ids that the student's LM loss is normalised over.
        common_vocab_size: number of ids that both models have: the KD term is normalised over these.
        common_columns: how many of this rank's columns are common.
        head_scale, final_softcap: of the student's head; gradients are with respect to the matrix product's result.
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

    @staticmethod
    def of(
        head: OutputHead,
        dense: DenseKnowledge | None,
        sparse: SparseKnowledge | None,
        objective: DistillationObjective,
        gradient_scale: float,
    ) -> "Problem":
        """Combine the student's head with the teacher's vocabulary; without a teacher the temperature is 1."""
        common = head.valid_vocab_size
        if dense is not None:
            common = min(common, dense.head.valid_vocab_size)
        elif sparse is None:
            objective = replace(objective, temperature=1.0)
        elif sparse.vocab_size is not None:
            common = min(common, sparse.vocab_size)
        return Problem(
            objective=objective,
            vocab_start=head.vocab_start,
            student_vocab_size=head.valid_vocab_size,
            common_vocab_size=common,
            common_columns=head.rows_below(common),
            head_scale=head.scale,
            final_softcap=head.final_softcap,
            gradient_scale=gradient_scale,
        )

    @property
    def separate_lm(self) -> bool:
        """Whether LM and KD need two softmaxes of the student."""
        return self.objective.temperature != 1.0 or self.common_vocab_size != self.student_vocab_size


@dataclass
class Tile:
    """Logits of n tokens: ``student`` [n, R] and ``teacher`` [n, common columns] fp32, which are overwritten.

    ``labels`` [n] int64 global ids, ``weights`` [n] fp32, ``sparse`` the tokens' part of the sparse knowledge.
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

    @staticmethod
    def concatenate(parts: Sequence["TokenLosses"]) -> "TokenLosses":
        """Join the tokens of ``parts``, which have the same terms."""
        if len(parts) == 1:
            return parts[0]

        def joined(values: list[Tensor | None]) -> Tensor | None:
            present = [value for value in values if value is not None]
            return torch.cat(present) if present else None

        return TokenLosses(
            torch.cat([part.lm for part in parts]), joined([p.kd for p in parts]), joined([p.entropy for p in parts])
        )


@dataclass
class LabelLogits:
    """The labels' columns on this rank and their logits.

    Attributes:
        column: [n], 0 where another rank has it.
        owned: [n] bool, whether this rank has it.
        logit: [n], of ``column``.
        exists: [n] bool, whether the student has the label at all; its loss is +inf otherwise.
    """

    column: Tensor
    owned: Tensor
    logit: Tensor
    exists: Tensor

    @staticmethod
    def of(tile: Tile, problem: Problem) -> "LabelLogits":
        """Look the labels of a tile up, before its logits are overwritten."""
        column, owned = local_columns(tile.labels, problem.vocab_start, tile.student.shape[1])
        logit = gather_columns(tile.student, column.unsqueeze(1)).squeeze(1)
        exists = (tile.labels >= 0) & (tile.labels < problem.student_vocab_size)
        return LabelLogits(column, owned, logit, exists)

    def relative_to(self, maximum: Tensor) -> Tensor:
        """Return the label's logit minus ``maximum`` on the rank that has it, else 0: a row to sum over the ranks."""
        return torch.where(self.owned, self.logit - maximum, 0.0)

    def loss(self, relative_logit: Tensor, log_z: Tensor) -> Tensor:
        """Return -log q(label) from sums over the ranks; +inf for an id that the student does not have."""
        return torch.where(self.exists, log_z - relative_logit, torch.inf)

    def subtract_one_hot(self, gradient: Tensor, coefficient: Tensor, rows: slice = slice(None)) -> None:
        """Subtract ``coefficient`` from ``gradient`` at the labels of the tokens ``rows``, in place."""
        if gradient.shape[1]:
            update = torch.where(self.owned[rows], -coefficient, 0.0)
            gradient.scatter_add_(1, self.column[rows].unsqueeze(1), update.unsqueeze(1))


def local_columns(ids: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the column of each id on this rank (0 where it has none), and whether it has one."""
    local = ids - vocab_start
    owned = (local >= 0) & (local < columns)
    return torch.where(owned, local, 0), owned


def gather_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return ``values`` [n, R] at ``columns`` [n, K]; zeros where R is 0."""
    if values.shape[1] == 0:
        return values.new_zeros(columns.shape)
    return values.gather(1, columns)


def row_max(values: Tensor) -> Tensor:
    """Return the maximum of each row of [n, R]; a large negative number where R is 0."""
    if values.shape[1] == 0:
        return values.new_full(values.shape[:1], EMPTY_MAXIMUM)
    return values.amax(-1)


def row_blocks(rows: int, columns: int, block_elements: int) -> Iterator[slice]:
    """Yield slices of ``rows`` whose temporaries hold about ``block_elements`` numbers (one row at least)."""
    step = max(1, block_elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


@dataclass(frozen=True)
class TensorParallel:
    """Reductions over a tensor-parallel group, None for one rank; all results are equal on its ranks.

    Every call is one collective of the group when it has more than one rank, and none otherwise.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Place of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def max_(self, values: Tensor) -> Tensor:
        """Take the element-wise maximum over the ranks, in place: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Take the element-wise sum over the ranks, in place: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def gather_sequence(self, hidden: Tensor) -> Tensor:
        """Join every rank's [s / TP, ...] to [s, ...] in rank order: one all-gather."""
        if self.size == 1:
            return hidden
        gathered = hidden.new_empty((hidden.shape[0] * self.size, *hidden.shape[1:]))
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=self.group)
        return gathered

    def scatter_sequence(self, gradient: Tensor) -> Tensor:
        """Sum [s, ...] over the ranks and return this rank's [s / TP, ...] of it: one reduce-scatter."""
        if self.size == 1:
            return gradient
        scattered = gradient.new_empty((gradient.shape[0] // self.size, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(scattered, gradient.contiguous(), op=dist.ReduceOp.SUM, group=self.group)
        return scattered


Evaluate = Callable[[Tile, Problem, TensorParallel, bool, int], TokenLosses]
"""An evaluator: (tile, problem, tensor_parallel, with_gradient, block_elements) to token losses; with a gradient,
``tile.student`` becomes that of the weighted loss with respect to the raw logits."""
