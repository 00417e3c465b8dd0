"""A teacher on ranks of its own, as the student's ranks see it: orders go out, knowledge comes in, in one order.

    begin_step   orders the step and, of the training data's schedule, as many more as the teacher may run ahead
    knowledge    waits for the micro-batch's hand-off, checks that it is about these token ids, posts the next receive

Batches outside of the schedule (held-out or generated text) travel to the teacher with their order; whatever was
ordered ahead is received and discarded first, and ordered again afterwards.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.errors import DataError
from megatron_kd.losses.types import DenseKnowledge, SparseKnowledge
from megatron_kd.parallel.groups import is_last_stage
from megatron_kd.teachers.interface import Action, Announced, Decision, Teacher
from megatron_kd.teachers.placements import StudentRun, plan_teacher
from megatron_kd.teachers.remote.channel import STOP, Channel, Order, SentBatches
from megatron_kd.teachers.remote.payloads import HEADER_NUMBERS, Header, Receiver, receiver_of
from megatron_kd.teachers.routing import Destination, Item
from megatron_kd.teachers.teacher_config import TeacherConfig


def build(config: TeacherConfig, run: StudentRun, groups: ProcessGroupCollection) -> "RemoteTeacher":
    """Build the student's end; see :func:`megatron_kd.teachers.placements.build_teacher`."""
    plan = plan_teacher(config, run)
    channel = Channel.between(run, plan)
    head = channel.move_head(None, run, plan) if config.payload_ids is None else None
    return RemoteTeacher(
        channel,
        groups,
        receiver_of(config, run, plan, head),
        prefetch_depth=config.prefetch_depth,
        train_iters=run.train_iters,
        device=run.device,
    )


@dataclass(frozen=True)
class _Due:
    """A hand-off that was ordered and not received yet; its micro-batch has [b, s] positions on this rank."""

    order_number: int
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
        """Wait until it has arrived."""
        for work in self.works:
            work.wait()
        return Header.from_tensor(self.header)


class RemoteTeacher(Teacher):
    """Knowledge from the teacher's ranks of a split world.

    Args:
        channel: the student's end; rank 0 writes orders.
        groups: the student's.
        receiver: the payload.
        prefetch_depth: receives that are under way at a time.
        train_iters: steps of the whole run; nothing is ordered beyond them.
        device: where hand-offs are received.
    """

    def __init__(
        self,
        channel: Channel,
        groups: ProcessGroupCollection,
        receiver: Receiver,
        *,
        prefetch_depth: int,
        train_iters: int,
        device: torch.device,
    ):
        self._bridge, self._orders, self._routing = channel.bridge, channel.orders, channel.routing
        self._groups, self._receiver, self._device = groups, receiver, device
        self._depth, self._train_iters = prefetch_depth, train_iters
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
        """Implement :class:`~megatron_kd.teachers.interface.Teacher`.

        Saves and rollbacks need nothing of the teacher: the batches it has read ahead follow in either case.
        """
        self._limit = decision.position + max(0, self._train_iters - decision.step)
        if decision.action is Action.STOP or decision.position != self._position:
            self._drain()
            self._position = self._ordered = decision.position
        if decision.action is Action.STOP and dist.get_rank() == 0:
            self._orders.write(STOP)
            self._orders.wait_for_stop(len(self._routing.teacher_ranks))

    def begin_step(self, batches: Sequence[Batch], *, scheduled: bool = True) -> None:
        """Order these micro-batches and, if they are scheduled, ``prefetch_depth`` more."""
        if scheduled:
            number, ahead = self._position, -(-self._depth // len(batches))
            self._ordered = max(self._ordered, number)
            while self._ordered <= max(number, min(number + ahead, self._limit - 1)):
                self._order(Order(self._ordered), batches)
                self._ordered += 1
            self._position += 1
        else:
            self._drain()
            self._ordered = self._position
            order = Order(sent=self._gathered(batches))
            number = order.number
            self._order(order, batches)
        self._announced = Announced(batches)
        self._expected = [Header(number, m, batch.key) for m, batch in enumerate(batches)]
        self._post()

    def knowledge(self, batch: Batch) -> DenseKnowledge | SparseKnowledge | None:
        """Return the next hand-off, which must be about ``batch``.

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
                f"{found.micro_batch}, key {found.key:#x}; the student expects step {expected.step}, micro-batch "
                f"{expected.micro_batch}, key {expected.key:#x}: do all ranks read the same data.path?"
            )
        self._post()
        return self._receiver.decode(receive.content)

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
        """Begin the next receives, until ``prefetch_depth`` are under way."""
        while self._due and len(self._receives) < self._depth:
            due = self._due.popleft()
            header = torch.empty(HEADER_NUMBERS, dtype=torch.int64, device=self._device)
            content = self._receiver.buffer(*due.shape, self._device)
            works = [self._bridge.receive(tensor, due.source) for tensor in (header, content)]
            self._receives.append(_Receive(due, header, content, works))

    def _drain(self) -> None:
        """Receive and discard what was ordered: the teacher sends it in any case."""
        while self._receives or self._due:
            self._post()
            self._receives.popleft().wait()

    def _gathered(self, batches: Sequence[Batch]) -> SentBatches:
        """Collect the micro-batches of all data-parallel ranks. Collective over them."""
        inputs = torch.stack([torch.stack([batch.tokens, batch.position_ids]) for batch in batches])
        chunk_indices = torch.stack([batch.chunk_indices for batch in batches])
        keys = torch.tensor([batch.key for batch in batches], device=inputs.device)
        return SentBatches(self._gather(inputs), self._gather(chunk_indices), self._gather(keys))

    def _gather(self, values: Tensor) -> Tensor:
        everyone = [torch.empty_like(values) for _ in range(self._groups.dp.size())]
        dist.all_gather(everyone, values, group=self._groups.dp)
        return torch.stack(everyone)
