"""The ranks of a remote teacher: read an order, run the forward passes that are routed here, send the result, repeat.

The last stage holds at most ``prefetch_depth`` hand-offs that the student has not begun to receive; then it waits
before it sends, and with it the pipeline behind it. So the teacher runs ahead that far and no further.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import create_process_groups, is_last_stage
from megatron_kd.parallel.runtime import seed_everything
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.interface import ScheduledBatches
from megatron_kd.teachers.placements import StudentRun, TeacherPlan, load_teacher
from megatron_kd.teachers.remote.channel import Channel, Order
from megatron_kd.teachers.remote.payloads import Header, Sender, sender_of
from megatron_kd.teachers.routing import Item, whole_sequence
from megatron_kd.teachers.teacher_config import TeacherConfig


def build_teacher_ranks(
    config: TeacherConfig, run: StudentRun, plan: TeacherPlan, batches: ScheduledBatches
) -> "RemoteTeacherRank":
    """Build the teacher's end; see :func:`megatron_kd.teachers.placements.build_teacher_ranks`."""
    groups = create_process_groups(plan.layout)
    seed_everything(0, groups)
    model_chunks = load_teacher(plan, run, groups)
    channel = Channel.between(run, plan)
    head = model_chunks[-1].output_head() if is_last_stage(groups) else None
    if config.payload_ids is None:
        channel.move_head(head, run, plan)
    sender = None if head is None else sender_of(config, run, plan, head, groups)
    return RemoteTeacherRank(
        model_chunks, groups, channel, batches, sender, prefetch_depth=config.prefetch_depth, device=run.device
    )


@dataclass(frozen=True)
class _Input:
    """A micro-batch: token and position ids [b, s], identity of each row's chunk [b], key."""

    tokens: Tensor
    position_ids: Tensor
    chunk_ids: Tensor
    key: int


class RemoteTeacherRank:
    """One rank of a remote teacher.

    Args:
        model_chunks: the frozen model's chunks on this rank.
        groups: the teacher's.
        channel: the teacher's end.
        batches: the batches that the orders' positions refer to.
        sender: the payload, on the last pipeline stage.
        prefetch_depth: hand-offs that may wait for the student.
    """

    def __init__(
        self,
        model_chunks: Sequence[HiddenStateGPTModel],
        groups: ProcessGroupCollection,
        channel: Channel,
        batches: ScheduledBatches,
        sender: Sender | None,
        *,
        prefetch_depth: int,
        device: torch.device,
    ):
        self._model_chunks, self._groups = list(model_chunks), groups
        self._bridge, self._orders, self._routing = channel.bridge, channel.orders, channel.routing
        self._batches, self._sender, self._depth, self._device = batches, sender, prefetch_depth, device
        self._pending: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        self.passes = 0
        """Micro-batches that went through this rank's layers."""
        self.started: list[tuple[int, Item, float]] = []
        """Step, item and ``time.monotonic()`` of the latest passes, for traces."""

    def run(self) -> None:
        """Execute orders until one says to stop."""
        while not (order := self._orders.read()).stops:
            self._execute(order)
            del self.started[:-10_000]
        while self._pending:
            self._wait_for_oldest()
        self._orders.acknowledge_stop()

    @torch.no_grad()
    def _execute(self, order: Order) -> None:
        """Run the order's micro-batches that are this replica's."""
        count = self._batches.micro_batches if order.sent is None else order.sent.inputs.shape[1]
        items = [
            item
            for item in self._routing.items(range(count))
            if self._routing.replica(order.number, item, count) == self._groups.dp.rank()
        ]
        if not items:
            return
        inputs = {item: self._input(order, item) for item in items}
        rows, seq_length = inputs[items[0]].tokens.shape
        self.passes += len(items)
        forward_only(
            self._model_chunks,
            self._groups,
            lambda item: self._start(order, item, inputs[item]),
            lambda item, hidden: self._send(order, item, hidden, inputs[item]),
            items,
            seq_length=seq_length,
            micro_batch_size=rows,
        )

    def _input(self, order: Order, item: Item) -> _Input:
        if order.sent is not None:
            place = (item.data_rank, item.micro_batch)
            tokens, position_ids = order.sent.inputs[place].to(self._device)
            return _Input(tokens, position_ids, order.sent.chunk_indices[place], int(order.sent.keys[place]))
        assert order.position is not None
        batch = self._batches.read(order.position, item.data_rank, item.micro_batch)
        moved = batch.to(self._device)
        return _Input(moved.tokens, moved.position_ids, self._batches.root_ids(batch), batch.key)

    def _start(self, order: Order, item: Item, batch: _Input) -> tuple[Tensor, Tensor]:
        self.started.append((order.number, item, time.monotonic()))
        return batch.tokens, batch.position_ids

    def _send(self, order: Order, item: Item, hidden: Tensor, batch: _Input) -> None:
        """Send a micro-batch's payload from every tensor-parallel rank of the last stage to the ranks it serves."""
        assert self._sender is not None
        hidden = whole_sequence(hidden, self._model_chunks[-1], self._groups)
        content = self._sender.encode(hidden, batch.chunk_ids)
        header = Header(order.number, item.micro_batch, batch.key).to_tensor(self._device)
        while len(self._pending) >= self._depth:
            self._wait_for_oldest()
        works, kept, replica = [], [header], self._groups.dp.rank()
        for destination in self._routing.destinations(item.data_rank):
            if self._routing.source_for(replica, destination) == self._bridge.rank:
                kept.append(self._routing.part_for(destination, content))
                works += [self._bridge.send(tensor, destination.rank) for tensor in (header, kept[-1])]
        if works:
            self._pending.append((works, kept))

    def _wait_for_oldest(self) -> None:
        for work in self._pending.popleft()[0]:
            work.wait()
