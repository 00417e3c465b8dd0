"""Which replica of a teacher computes which micro-batch, and how its results and its output layer reach the student.

The student has D data-parallel ranks, the teacher E replicas: micro-batch m of the student's rank d is computed by
exactly one replica, a pure function of (step, d, m) that every rank evaluates alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.types import OutputHead
from megatron_kd.models.gpt import HiddenStateGPTModel
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


@dataclass(frozen=True)
class Transfer:
    """A tensor that rank ``source`` sends to rank ``destination`` (ranks of the group that carries it)."""

    source: int
    destination: int
    tensor: Tensor
    """On the source what is sent, on the destination the buffer; shape and dtype agree."""


class Carrier(Protocol):
    """A group that tensors travel over."""

    rank: int

    def exchange(self, transfers: Sequence[Transfer]) -> None:
        """Perform this rank's part of ``transfers``; those between the same two ranks in the same order on both."""


class GroupCarrier:
    """A group of the default world, used for nothing else."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.rank = dist.get_rank(group)

    def exchange(self, transfers: Sequence[Transfer]) -> None:
        """Implement :class:`Carrier`."""
        operations = []
        for transfer in transfers:
            if transfer.source == self.rank:
                sent = transfer.tensor.contiguous()
                operations.append(dist.P2POp(dist.isend, sent, transfer.destination, self._group))
            elif transfer.destination == self.rank:
                operations.append(dist.P2POp(dist.irecv, transfer.tensor, transfer.source, self._group))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()


def reshard_head(
    own: OutputHead | None,
    routing: Routing,
    carrier: Carrier | None,
    *,
    student_rows: int,
    teacher_rows: int,
    valid_vocab_size: int,
    hidden_size: int,
    like: Tensor,
) -> OutputHead | None:
    """Bring the teacher's output rows for its vocabulary interval to every rank of the student's last stages.

    Collective over all ranks.

    Args:
        own: this rank's part of the teacher's output layer, on the teacher's last stage.
        carrier: what rows travel over; not needed where every rank has its rows already.
        student_rows, teacher_rows: rows of the output weights on a tensor-parallel rank.
        like: has the weight's dtype and device.

    Returns:
        The head on a rank of the student's last stages (``own`` itself if nothing moves), for the ids that the student
        has rows for; else None.

    Raises:
        ConfigError: the head has a bias, a scale or a softcap, which are not moved.
    """
    if routing.shares_stages and student_rows == teacher_rows:
        return own
    if own is not None and (own.bias is not None or own.scale != 1.0 or own.final_softcap is not None):
        raise ConfigError(
            "the teacher's output layer has a bias, a scale or a softcap, which cannot be moved to another layout yet: "
            "give the teacher the student's layout"
        )
    assert carrier is not None
    here = _place_among_destinations(routing, carrier.rank)
    head = None
    if here is not None:
        weight = torch.zeros(student_rows, hidden_size, dtype=like.dtype, device=like.device)
        shared = min(valid_vocab_size, student_rows * routing.student.tensor)
        head = OutputHead(weight, shared, vocab_start=here.tensor * student_rows)
    transfers = []
    for move in head_moves(routing, student_rows, teacher_rows, valid_vocab_size):
        source = move.rows_of(own) if carrier.rank == move.source else None
        target = move.rows_of(head) if carrier.rank == move.destination else None
        if source is not None and target is not None:
            target.copy_(source)
        elif source is not None:
            transfers.append(Transfer(move.source, move.destination, source))
        elif target is not None:
            transfers.append(Transfer(move.source, move.destination, target))
    carrier.exchange(transfers)
    return head


@dataclass(frozen=True)
class RowMove:
    """Rows ``start .. stop - 1`` (global) of the teacher's output weight, from one rank to another."""

    source: int
    destination: int
    start: int
    stop: int

    def rows_of(self, head: OutputHead | None) -> Tensor:
        """Return a view of these rows in a head that has them."""
        assert head is not None
        return head.weight.detach()[self.start - head.vocab_start : self.stop - head.vocab_start]


def head_moves(routing: Routing, student_rows: int, teacher_rows: int, valid_rows: int) -> list[RowMove]:
    """List the moves that bring the teacher's output weight to every rank of the student's last stages.

    Args:
        student_rows, teacher_rows: rows of the output weights on a tensor-parallel rank.
        valid_rows: rows at or above this are padding and do not move.
    """
    moves = []
    for data_rank in range(routing.student.data):
        sources = routing.sources(data_rank % routing.teacher.data)
        for destination in routing.destinations(data_rank):
            low = destination.tensor * student_rows
            high = min(low + student_rows, valid_rows)
            for t, source in enumerate(sources):
                start, stop = max(low, t * teacher_rows), min(high, (t + 1) * teacher_rows)
                if start < stop:
                    moves.append(RowMove(source, destination.rank, start, stop))
    return moves


def _place_among_destinations(routing: Routing, rank: int) -> Destination | None:
    every = (place for data_rank in range(routing.student.data) for place in routing.destinations(data_rank))
    return next((place for place in every if place.rank == rank), None)


def whole_sequence(hidden: Tensor, model_chunk: HiddenStateGPTModel, groups: ProcessGroupCollection) -> Tensor:
    """Return hidden states [s, b, h] of the whole sequence, on every tensor-parallel rank."""
    if model_chunk.config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=groups.tp)
    return hidden
