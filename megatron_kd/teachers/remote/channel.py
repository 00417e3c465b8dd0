"""What connects the two worlds of a remote teacher: orders go to the teacher's ranks, tensors come back.

Orders are an append-only log in the job's store, which every teacher rank reads from the start. An order is work for
all teacher ranks and is never withdrawn: the teacher executes the log in order; the student takes what it ordered, or
receives and discards it. So both sides always agree on what is under way, wherever the student stops, evaluates or
jumps to in the data.
"""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.losses.types import OutputHead
from megatron_kd.teachers.placements import StudentRun, TeacherPlan
from megatron_kd.teachers.routing import Routing, Transfer, reshard_head

_KEPT_ORDERS = 1000  # in the store: more than any teacher rank can lag
_LONGEST_NAP = 0.05


@dataclass(frozen=True)
class SentBatches:
    """Micro-batches that are not of the training data's schedule, M for each of D data-parallel ranks.

    Attributes:
        inputs: int64 [D, M, 2, b, s], token and position ids.
        chunk_indices: int64 [D, M, b], which decide what a sampled payload draws.
        keys: int64 [D, M], sent back with the knowledge.
    """

    inputs: Tensor
    chunk_indices: Tensor
    keys: Tensor

    def to_bytes(self) -> bytes:
        """Serialize the tensors, moved to the CPU."""
        buffer = io.BytesIO()
        torch.save((self.inputs.int().cpu(), self.chunk_indices.cpu(), self.keys.cpu()), buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SentBatches":
        """Invert :meth:`to_bytes`."""
        inputs, chunk_indices, keys = torch.load(io.BytesIO(data), weights_only=True)
        return cls(inputs.long(), chunk_indices, keys)


@dataclass(frozen=True)
class Order:
    """Work for the teacher's ranks: a global batch of the schedule, batches that are sent along, or to stop."""

    position: int | None = None
    """The global batch of the training data's schedule."""
    sent: SentBatches | None = None

    @property
    def stops(self) -> bool:
        """Whether it is the last order."""
        return self.position is None and self.sent is None

    @property
    def number(self) -> int:
        """The step that the hand-offs of this order carry; -1 for batches that are sent along."""
        return -1 if self.position is None else self.position


STOP = Order()


class OrderLog:
    """One end of the log, with its own position in it."""

    def __init__(self, store: dist.Store):
        self._store = dist.PrefixStore("orders", store)
        self._next = 0

    def write(self, order: Order) -> None:
        """Append an order; by one rank of the student only."""
        key = str(self._next)
        if order.sent is not None:
            self._store.set(f"{key}/sent", order.sent.to_bytes())  # type: ignore[arg-type]  # the stub lacks bytes
        self._store.set(key, json.dumps({"position": order.position, "sends": order.sent is not None}))
        old = self._next - _KEPT_ORDERS
        if old >= 0:
            self._store.delete_key(str(old))
            self._store.delete_key(f"{old}/sent")
        self._next += 1

    def read(self) -> Order:
        """Wait for the next order, as long as it takes, and return it."""
        key = str(self._next)
        nap = 0.001
        while not self._store.check([key]):
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        self._next += 1
        content = json.loads(self._store.get(key))
        sent = SentBatches.from_bytes(self._store.get(f"{key}/sent")) if content["sends"] else None
        return Order(content["position"], sent)

    def acknowledge_stop(self) -> None:
        """Report that this teacher rank has read the last order and needs the store no more."""
        self._store.add("stopped", 1)

    def wait_for_stop(self, num_teachers: int) -> None:
        """Wait until every teacher rank has acknowledged the last order."""
        while self._store.add("stopped", 0) < num_teachers:
            time.sleep(0.005)


class Bridge:
    """The group over both worlds; tensors travel from the teacher's ranks to the student's only."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.rank = group.rank()

    def send(self, tensor: Tensor, destination: int) -> dist.Work:
        """Begin to send; ``tensor`` must not change until the work is done."""
        return self._group.send([tensor], destination, 0)

    def receive(self, buffer: Tensor, source: int) -> dist.Work:
        """Begin to receive into ``buffer``."""
        return self._group.recv([buffer], source, 0)

    def exchange(self, transfers: Sequence[Transfer]) -> None:
        """Implement :class:`~megatron_kd.teachers.routing.Carrier`."""
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
class Channel:
    """One rank's end of the connection: who sends to whom, and both ways."""

    routing: Routing
    bridge: Bridge
    orders: OrderLog

    @classmethod
    def between(cls, run: StudentRun, plan: TeacherPlan) -> "Channel":
        """Open this rank's end.

        Raises:
            ValueError: the world is not split.
        """
        if run.split is None:
            raise ValueError("a remote teacher needs a world that is split into the student's and the teacher's ranks")
        ranks = range(run.split.world_size)
        student_ranks, teacher_ranks = ranks[: run.split.num_students], ranks[run.split.num_students :]
        routing = Routing(run.layout, plan.layout, student_ranks, teacher_ranks)
        return cls(routing, Bridge(run.split.bridge), OrderLog(run.split.store))

    def move_head(self, own: OutputHead | None, run: StudentRun, plan: TeacherPlan) -> OutputHead | None:
        """Send the teacher's output layer to the student's last stages, once. Collective over both worlds.

        Args:
            own: this rank's part of it, on the teacher's last stage.

        Returns:
            This rank's part of it on the student's last stages; None elsewhere.
        """
        return reshard_head(
            own,
            self.routing,
            self.bridge,
            student_rows=run.head_rows,
            teacher_rows=plan.head_rows,
            valid_vocab_size=plan.info.architecture.vocab_size,
            hidden_size=plan.info.architecture.hidden_size,
            like=torch.empty(0, dtype=run.dtype, device=run.device),
        )
