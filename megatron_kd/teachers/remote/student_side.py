"""A teacher on ranks of its own, as the student's ranks see it: orders go out, knowledge comes in, in one order.

    begin_step   orders the step and, of the training data's schedule, as many more as the teacher may run ahead
    knowledge    waits for the micro-batch's hand-off, checks that it is of these token ids, posts the next receive

Batches that are not of the schedule (held-out or generated text) travel to the teacher with their order; whatever was
ordered ahead is received and dropped first, and ordered again afterwards.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.errors import DataError
from megatron_kd.losses import DenseKnowledge, OutputHead, SparseKnowledge
from megatron_kd.parallel.groups import is_last_stage
from megatron_kd.teachers.interface import Action, Announced, Decision
from megatron_kd.teachers.remote.payloads import HEADER_NUMBERS, Header, Payload
from megatron_kd.teachers.remote.routing import Destination, Item, Routing
from megatron_kd.teachers.remote.transport import Bridge, Order, OrderLog


@dataclass(frozen=True)
class _Due:
    """A hand-off that was ordered: of which order, which micro-batch, from which rank, of how many [b, s] here."""

    number: int
    micro_batch: int
    source: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class _Receive:
    """A hand-off whose receive has begun."""

    due: _Due
    header: Tensor
    content: Tensor
    works: Sequence[dist.Work]

    def wait(self) -> Header:
        """Until it is here."""
        for work in self.works:
            work.wait()
        return Header.of(self.header)


class RemoteTeacher:
    """Knowledge from the teacher's ranks of a split world.

    Args:
        bridge: over both worlds.
        orders: the student's end; rank 0 writes.
        routing: both layouts and where their ranks are.
        groups: the student's.
        payload: what arrives.
        head: the teacher's output layer for this rank's interval, where the payload needs it.
        prefetch_depth: receives that are under way at a time.
        train_iters: steps of the whole run: nothing is ordered beyond.
    """

    def __init__(
        self,
        bridge: Bridge,
        orders: OrderLog,
        routing: Routing,
        groups: ProcessGroupCollection,
        payload: Payload,
        head: OutputHead | None,
        *,
        prefetch_depth: int,
        train_iters: int,
    ):
        self._bridge, self._orders, self._routing, self._groups = bridge, orders, routing, groups
        self._payload, self._head, self._depth, self._train_iters = payload, head, prefetch_depth, train_iters
        self._takes = is_last_stage(groups)
        self._position = self._ordered = 0
        self._limit = train_iters
        self._due: deque[_Due] = deque()
        self._receives: deque[_Receive] = deque()
        self._announced = Announced(())
        self._expected: list[Header] = []
        self.waited_seconds = 0.0
        """How long this rank has waited for hand-offs."""

    def follow(self, decision: Decision) -> None:
        """See :class:`~megatron_kd.teachers.interface.Teacher`. Saves and rollbacks need nothing of the teacher: what
        it has read ahead is of the batches that follow in either case."""
        self._limit = decision.position + max(0, self._train_iters - decision.step)
        if decision.action is Action.STOP or decision.position != self._position:
            self._drain()
            self._position = self._ordered = decision.position
        if decision.action is Action.STOP and dist.get_rank() == 0:
            self._orders.write(Order(stops=True))
            self._orders.wait_for_stop(len(self._routing.teacher_ranks))

    def begin_step(self, batches: Sequence[Batch], *, scheduled: bool = True) -> None:
        """Order these micro-batches and, if they are scheduled, ``prefetch_depth`` more."""
        if scheduled:
            number, ahead = self._position, -(-self._depth // len(batches))
            self._ordered = max(self._ordered, number)
            while self._ordered <= max(number, min(number + ahead, self._limit - 1)):
                self._order(Order(position=self._ordered), batches)
                self._ordered += 1
            self._position += 1
        else:
            self._drain()
            self._ordered = self._position
            order = self._with_inputs(batches)
            number = order.number
            self._order(order, batches)
        self._announced = Announced(batches)
        self._expected = [Header(number, m, batch.key) for m, batch in enumerate(batches)]
        self._device = batches[0].tokens.device
        self._post()

    def knowledge(self, batch: Batch) -> DenseKnowledge | SparseKnowledge | None:
        """The next hand-off, which must be about ``batch``.

        Raises:
            DataError: it is about other token ids: the teacher's ranks read other data, or in another order.
        """
        if not self._takes:
            return None
        expected, receive = self._expected[self._announced.take(batch)], self._receives.popleft()
        started = time.perf_counter()
        found = receive.wait()
        self.waited_seconds += time.perf_counter() - started
        if found != expected:
            raise DataError(
                f"the teacher (rank {receive.due.source}) sent knowledge of step {found.step}, micro-batch "
                f"{found.micro_batch}, token hash {found.token_hash:#x}; the student expects step {expected.step}, "
                f"micro-batch {expected.micro_batch}, hash {expected.token_hash:#x}: do all ranks read the same "
                "data.path?"
            )
        self._post()
        return self._payload.decode(receive.content, self._head)

    def _order(self, order: Order, batches: Sequence[Batch]) -> None:
        if dist.get_rank() == 0:
            self._orders.write(order)
        if not self._takes:
            return
        data_rank, count = self._groups.dp.rank(), len(batches)
        here = Destination(self._bridge.rank, self._groups.tp.rank(), self._groups.cp.rank())
        for m, batch in enumerate(batches):
            replica = self._routing.replica(order.number, Item(m, data_rank), count)
            rows, length = batch.tokens.shape
            shape = (rows, length // self._routing.student.context)
            self._due.append(_Due(order.number, m, self._routing.source_for(replica, here), shape))

    def _post(self) -> None:
        """Begin the receives that come next, ``prefetch_depth`` at a time."""
        while self._due and len(self._receives) < self._depth:
            due = self._due.popleft()
            header = torch.empty(HEADER_NUMBERS, dtype=torch.int64, device=self._device)
            content = self._payload.buffer(*due.shape, self._device)
            works = [self._bridge.receive(tensor, due.source) for tensor in (header, content)]
            self._receives.append(_Receive(due, header, content, works))

    def _drain(self) -> None:
        """Take and drop what was ordered: the teacher sends it in any case."""
        while self._receives or self._due:
            self._post()
            self._receives.popleft().wait()

    def _with_inputs(self, batches: Sequence[Batch]) -> Order:
        """An order that carries the token ids of all data-parallel ranks. Collective over them."""
        own = torch.stack([torch.stack([batch.tokens, batch.position_ids]) for batch in batches])
        chunks = torch.stack([batch.chunk_indices for batch in batches])
        hashes = torch.tensor([batch.key for batch in batches], device=own.device)
        return Order(inputs=self._gather(own), chunks=self._gather(chunks), hashes=self._gather(hashes))

    def _gather(self, values: Tensor) -> Tensor:
        everyone = [torch.empty_like(values) for _ in range(self._groups.dp.size())]
        dist.all_gather(everyone, values, group=self._groups.dp)
        return torch.stack(everyone)
