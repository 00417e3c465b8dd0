"""Tensors between ranks: a batch of sends and receives, and the output weight re-sharded by intervals of rows."""

from dataclasses import dataclass
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses import OutputHead
from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.teachers.routing import Routing


@dataclass(frozen=True)
class Transfer:
    """A tensor that rank ``source`` sends to rank ``destination`` (ranks of the group that carries it)."""

    source: int
    destination: int
    tensor: Tensor
    """On the source what is sent, on the destination the buffer; of the right shape and dtype on both."""


def exchange(transfers: Sequence[Transfer], group: dist.ProcessGroup) -> None:
    """Perform this rank's part of ``transfers``; those between the same two ranks in the same order on both."""
    rank = dist.get_rank(group)
    operations = []
    for transfer in transfers:
        if transfer.source == rank:
            operations.append(dist.P2POp(dist.isend, transfer.tensor.contiguous(), transfer.destination, group))
        elif transfer.destination == rank:
            operations.append(dist.P2POp(dist.irecv, transfer.tensor, transfer.source, group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


@dataclass(frozen=True)
class RowMove:
    """Rows ``start .. stop - 1`` (global) of the teacher's output weight, from one rank to another."""

    source: int
    destination: int
    start: int
    stop: int


def head_moves(routing: Routing, student_rows: int, teacher_rows: int, valid_rows: int) -> list[RowMove]:
    """How the teacher's output weight reaches every rank of the student's last stages.

    Args:
        student_rows: rows of the student's output weight on a tensor-parallel rank.
        teacher_rows: the same of the teacher's.
        valid_rows: rows at or above this are padding and stay.
    """
    moves = []
    for data_rank in range(routing.student.data):
        sources = routing.sources(data_rank % routing.teacher.data)
        for tensor_rank, destination in enumerate(routing.destinations(data_rank)):
            low, high = tensor_rank * student_rows, min((tensor_rank + 1) * student_rows, valid_rows)
            for t, source in enumerate(sources):
                start, stop = max(low, t * teacher_rows), min(high, (t + 1) * teacher_rows)
                if start < stop:
                    moves.append(RowMove(source, destination, start, stop))
    return moves


def reshard_head(
    own: OutputHead | None,
    routing: Routing,
    carrier: dist.ProcessGroup | None,
    *,
    student_rows: int,
    valid_vocab_size: int,
    hidden_size: int,
    like: Tensor,
) -> OutputHead | None:
    """Give every rank of the student's last stages the rows of its interval of ids. Collective over all ranks.

    Args:
        own: this rank's part of the teacher's output layer, on the teacher's last stage.
        carrier: the group over which rows move; None if both layouts are the same, so that none do.
        student_rows: rows of the student's output weight on a tensor-parallel rank.
        like: has the weight's dtype and device.

    Returns:
        The head on a rank of the student's last stages (``own`` itself if nothing moves); else None.

    Raises:
        ConfigError: the head has a bias, which is not moved.
    """
    if carrier is None:
        return own
    if own is not None and own.bias is not None:
        raise ConfigError("the teacher's output layer has a bias, which cannot be moved to another layout yet")
    teacher_rows = padded_vocab_size(valid_vocab_size, routing.teacher.tensor) // routing.teacher.tensor
    rank, head, transfers = dist.get_rank(carrier), None, []
    for data_rank in range(routing.student.data):
        if rank in routing.destinations(data_rank):
            start = routing.destinations(data_rank).index(rank) * student_rows
            weight = torch.zeros(student_rows, hidden_size, dtype=like.dtype, device=like.device)
            head = OutputHead(weight, valid_vocab_size, vocab_start=start)
    for move in head_moves(routing, student_rows, teacher_rows, valid_vocab_size):
        if rank == move.destination:
            target = head.weight[move.start - head.vocab_start : move.stop - head.vocab_start]
        if rank == move.source:
            rows = own.weight.detach()[move.start - own.vocab_start : move.stop - own.vocab_start]
        if move.source == move.destination == rank:
            target.copy_(rows)
        elif rank in (move.source, move.destination):
            transfers.append(Transfer(move.source, move.destination, rows if rank == move.source else target))
    exchange(transfers, carrier)
    return head
