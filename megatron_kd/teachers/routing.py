"""Which data-parallel replica of a teacher computes which micro-batch, and where its hidden states go. Arithmetic only.

The student has D data-parallel ranks, the teacher E replicas: micro-batch m of the student's rank d is computed by
exactly one replica, a pure function of (step, d, m) that every rank evaluates alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_kd.parallel.groups import positions_of_rank
from megatron_kd.parallel.layout import ParallelLayout


@dataclass(frozen=True, order=True)
class Item:
    """A micro-batch of a step: number ``micro_batch`` of the student's data-parallel rank ``data_rank``."""

    micro_batch: int
    data_rank: int


@dataclass(frozen=True)
class Destination:
    """A rank of the student's last stage: its global number, and its place among those that share a micro-batch."""

    rank: int
    tensor: int
    context: int


@dataclass(frozen=True)
class Routing:
    """Both layouts, and the global ranks that hold them.

    Args:
        student: the student's layout.
        teacher: the teacher's layout.
        student_ranks: global rank of each rank of the student's layout.
        teacher_ranks: global rank of each rank of the teacher's layout; the student's ranks if it is co-located.
    """

    student: ParallelLayout
    teacher: ParallelLayout
    student_ranks: Sequence[int]
    teacher_ranks: Sequence[int]

    @property
    def shares_stages(self) -> bool:
        """Whether every rank holds the same pipeline stage and tensor-parallel part of both models."""
        student, teacher = self.student, self.teacher
        same_ranks = list(self.student_ranks) == list(self.teacher_ranks)
        return same_ranks and (student.tensor, student.pipeline) == (teacher.tensor, teacher.pipeline)

    def replica(self, step: int, item: Item, micro_batches: int) -> int:
        """Return the replica that computes ``item`` of ``step``; every data-parallel rank has ``micro_batches``.

        Where one data-parallel size divides the other, a replica serves neighbouring ranks, the same ones in every
        step; otherwise micro-batches are dealt out in turn, across steps.
        """
        ours, theirs = self.student.data, self.teacher.data
        if ours % theirs == 0:
            return item.data_rank // (ours // theirs)
        if theirs % ours == 0:
            each = theirs // ours
            return item.data_rank * each + (step * micro_batches + item.micro_batch) % each
        return ((step * micro_batches + item.micro_batch) * ours + item.data_rank) % theirs

    def items(self, micro_batches: range) -> list[Item]:
        """List the items of some micro-batch numbers, in the order in which they are computed and sent."""
        return [Item(m, d) for m in micro_batches for d in range(self.student.data)]

    def destinations(self, data_rank: int) -> list[Destination]:
        """List the ranks of the student's last stage of ``data_rank``, by context- and tensor-parallel rank."""
        last = self.student.pipeline - 1
        return [
            Destination(
                self.student_ranks[self.student.rank_at(tensor=j, data=data_rank, pipeline=last, context=c)], j, c
            )
            for c in range(self.student.context)
            for j in range(self.student.tensor)
        ]

    def sources(self, replica: int) -> list[int]:
        """List the global ranks of the last stage of a teacher's ``replica``, by tensor-parallel rank."""
        return [
            self.teacher_ranks[self.teacher.rank_at(tensor=t, data=replica, pipeline=self.teacher.pipeline - 1)]
            for t in range(self.teacher.tensor)
        ]

    def source_for(self, replica: int, destination: Destination) -> int:
        """Return which of ``sources`` sends to ``destination``: the rank itself where it is one of them."""
        sources = self.sources(replica)
        return destination.rank if destination.rank in sources else sources[destination.tensor % len(sources)]

    def part_for(self, destination: Destination, values: Tensor) -> Tensor:
        """Cut the positions that ``destination`` computes from values [s, ...] of whole sequences."""
        return positions_of_rank(values, self.student.context, destination.context)
