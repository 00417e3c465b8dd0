"""Tensors between ranks: a batch of sends and receives, and the output weight re-sharded by intervals of rows.

What the student's ranks want of a remote teacher: an ordered log in the store that all its ranks read alike.

An order is work for all teacher ranks and is never withdrawn: the teacher does what is ordered, in order, and the
student takes what it ordered, or takes and drops it. So both sides always agree on what is under way, whenever the
student stops, evaluates or goes on elsewhere in the data. Saving needs nothing of a teacher whose weights are frozen.
"""

import io
import json
import time
from dataclasses import dataclass
from typing import Protocol, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses import OutputHead
from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.teachers.remote.routing import Routing


@dataclass(frozen=True)
class Transfer:
    """A tensor that rank ``source`` sends to rank ``destination`` (ranks of the group that carries it)."""

    source: int
    destination: int
    tensor: Tensor
    """On the source what is sent, on the destination the buffer; of the right shape and dtype on both."""


class Carrier(Protocol):
    """What tensors travel over."""

    rank: int

    def exchange(self, transfers: Sequence[Transfer]) -> None:
        """Perform this rank's part of ``transfers``; those between the same two ranks in the same order on both."""


class GroupCarrier:
    """A group of the default world, used for nothing else."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.rank = dist.get_rank(group)

    def exchange(self, transfers: Sequence[Transfer]) -> None:
        """See :class:`Carrier`."""
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


class Bridge:
    """The group over both halves of a split world: tensors go from the teacher's ranks to the student's only."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.rank = group.rank()

    def send(self, tensor: Tensor, destination: int) -> dist.Work:
        """Begin to send; ``tensor`` must stay as it is until the work is done."""
        return self._group.send([tensor], destination, 0)

    def receive(self, buffer: Tensor, source: int) -> dist.Work:
        """Begin to receive into ``buffer``."""
        return self._group.recv([buffer], source, 0)

    def exchange(self, transfers: Sequence[Transfer]) -> None:
        """See :class:`Carrier`."""
        works, kept = [], []
        for transfer in transfers:
            if transfer.source == self.rank:
                kept.append(transfer.tensor.contiguous())
                works.append(self.send(kept[-1], transfer.destination))
            elif transfer.destination == self.rank:
                works.append(self.receive(transfer.tensor, transfer.source))
        for work in works:
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
        for destination in routing.destinations(data_rank):
            low = destination.tensor * student_rows
            high = min(low + student_rows, valid_rows)
            for t, source in enumerate(sources):
                start, stop = max(low, t * teacher_rows), min(high, (t + 1) * teacher_rows)
                if start < stop:
                    moves.append(RowMove(source, destination.rank, start, stop))
    return moves


def reshard_head(
    own: OutputHead | None,
    routing: Routing,
    carrier: Carrier | None,
    *,
    student_rows: int,
    valid_vocab_size: int,
    hidden_size: int,
    like: Tensor,
) -> OutputHead | None:
    """Give every rank of the student's last stages the rows of its interval of ids. Collective over all ranks.

    Args:
        own: this rank's part of the teacher's output layer, on the teacher's last stage.
        carrier: what rows move over; not needed where every rank has its rows already.
        student_rows: rows of the student's output weight on a tensor-parallel rank.
        like: has the weight's dtype and device.

    Returns:
        The head on a rank of the student's last stages (``own`` itself if nothing moves), of the ids that the student
        has rows for; else None.

    Raises:
        ConfigError: the head has a bias, a scale or a softcap, which are not moved.
    """
    teacher_rows = padded_vocab_size(valid_vocab_size, routing.teacher.tensor) // routing.teacher.tensor
    if routing.shares_stages and student_rows == teacher_rows:
        return own
    if own is not None and (own.bias is not None or own.scale != 1.0 or own.final_softcap is not None):
        raise ConfigError(
            "the teacher's output layer has a bias, a scale or a softcap, which cannot be moved to another layout yet: "
            "give the teacher the student's layout"
        )
    rank, head, transfers = carrier.rank, None, []
    arriving = min(valid_vocab_size, student_rows * routing.student.tensor)
    for data_rank in range(routing.student.data):
        for destination in routing.destinations(data_rank):
            if destination.rank == rank:
                weight = torch.zeros(student_rows, hidden_size, dtype=like.dtype, device=like.device)
                head = OutputHead(weight, arriving, vocab_start=destination.tensor * student_rows)
    for move in head_moves(routing, student_rows, teacher_rows, valid_vocab_size):
        if rank == move.destination:
            target = head.weight[move.start - head.vocab_start : move.stop - head.vocab_start]
        if rank == move.source:
            rows = own.weight.detach()[move.start - own.vocab_start : move.stop - own.vocab_start]
        if move.source == move.destination == rank:
            target.copy_(rows)
        elif rank in (move.source, move.destination):
            transfers.append(Transfer(move.source, move.destination, rows if rank == move.source else target))
    carrier.exchange(transfers)
    return head


_KEPT = 1000  # orders that stay in the store behind the newest: more than any teacher rank can lag
_LONGEST_NAP = 0.05


@dataclass(frozen=True)
class Order:
    """Work for the teacher's ranks.

    Attributes:
        position: the global batch of the training data's schedule to work on; None where ``inputs`` are sent.
        inputs: int64 [D, M, 2, b, s], token and position ids of M micro-batches of D data-parallel ranks.
        chunks: int64 [D, M, b], the chunk indices of the rows, which decide what is drawn of a sampled payload.
        hashes: int64 [D, M], sent back with the knowledge.
        stops: nothing follows.
    """

    position: int | None = None
    inputs: Tensor | None = None
    chunks: Tensor | None = None
    hashes: Tensor | None = None
    stops: bool = False

    @property
    def number(self) -> int:
        """What the hand-offs of this order carry as their step."""
        return -1 if self.position is None else self.position


class OrderLog:
    """One end of the log; each has its own place in it."""

    def __init__(self, store: dist.Store):
        self._store = dist.PrefixStore("orders", store)
        self._next = 0

    def write(self, order: Order) -> None:
        """Append an order (by one rank of the student only)."""
        key = str(self._next)
        if order.inputs is None:
            self._store.set(key, json.dumps({"position": order.position, "stops": order.stops}))
        else:
            buffer = io.BytesIO()
            torch.save((order.inputs.int().cpu(), order.chunks.cpu(), order.hashes.cpu()), buffer)
            self._store.set(f"{key}/inputs", buffer.getvalue())
            self._store.set(key, json.dumps({"inputs": True}))
        self._next += 1
        if self._next > _KEPT:
            self._store.delete_key(str(self._next - _KEPT))
            self._store.delete_key(f"{self._next - _KEPT}/inputs")

    def read(self) -> Order:
        """The next order, waiting for it as long as it takes."""
        key = str(self._next)
        nap = 0.001
        while not self._store.check([key]):
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        self._next += 1
        content = json.loads(self._store.get(key))
        if not content.get("inputs"):
            return Order(position=content["position"], stops=content["stops"])
        inputs, chunks, hashes = torch.load(io.BytesIO(self._store.get(f"{key}/inputs")), weights_only=True)
        return Order(inputs=inputs.long(), chunks=chunks, hashes=hashes)

    def acknowledge_stop(self) -> None:
        """A teacher rank has read the last order and needs the store no more."""
        self._store.add("stopped", 1)

    def wait_for_stop(self, num_teachers: int) -> None:
        """Until every teacher rank has."""
        while self._store.add("stopped", 0) < num_teachers:
            time.sleep(0.005)
