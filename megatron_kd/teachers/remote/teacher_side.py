"""The teacher's own ranks: read an order, run the forward passes that are routed here, send what they give, repeat.

The last stage holds at most ``prefetch_depth`` hand-offs that the student has not begun to receive: beyond that it
waits before it sends, and with it the pipeline behind it. So the teacher runs ahead as far as that, and no further.
"""

import time
from collections import deque
from typing import Protocol, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.colocated import whole_sequence
from megatron_kd.teachers.remote.payloads import Header, Payload
from megatron_kd.teachers.remote.routing import Item, Routing
from megatron_kd.teachers.remote.transport import Bridge, Order, OrderLog


class ScheduledBatches(Protocol):
    """The batches of the training data's schedule, as the student's ranks read them."""

    micro_batches: int
    """Of a data-parallel rank and step."""

    def read(self, position: int, item: Item) -> Batch:
        """One micro-batch of a global batch."""

    def identities(self, batch: Batch) -> Tensor:
        """int64 [b], the ids that its chunks have in their root dataset."""


class TeacherRanks:
    """One rank of a remote teacher.

    Args:
        chunks: the frozen model's chunks on this rank.
        groups: the teacher's.
        routing: both layouts and where their ranks are.
        bridge: over both worlds.
        orders: this rank's end of the log.
        batches: what the orders' positions mean.
        payload: what is sent.
        prefetch_depth: hand-offs that may wait for the student.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenStateGPTModel],
        groups: ProcessGroupCollection,
        routing: Routing,
        bridge: Bridge,
        orders: OrderLog,
        batches: ScheduledBatches,
        payload: Payload,
        *,
        prefetch_depth: int,
        device: torch.device,
    ):
        self._chunks, self._groups, self._routing = list(chunks), groups, routing
        self._bridge, self._orders, self._batches, self._payload = bridge, orders, batches, payload
        self._depth, self._device = prefetch_depth, device
        self._pending: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        self.passes = 0
        """Micro-batches that went through this rank's layers."""
        self.started: list[tuple[int, Item, float]] = []
        """Step, item and ``time.monotonic()`` of the newest passes, for traces."""

    def run(self) -> None:
        """Work until told to stop."""
        while not (order := self._orders.read()).stops:
            self._work(order)
            del self.started[:-10_000]
        while self._pending:
            self._wait_for_oldest()
        self._orders.acknowledge_stop()

    @torch.no_grad()
    def _work(self, order: Order) -> None:
        """The micro-batches of an order that are this replica's."""
        count = self._batches.micro_batches if order.inputs is None else order.inputs.shape[1]
        items = [
            item
            for item in self._routing.items(range(count))
            if self._routing.replica(order.number, item, count) == self._groups.dp.rank()
        ]
        if not items:
            return
        inputs = {item: self._inputs(order, item) for item in items}
        rows, seq_length = inputs[items[0]][0].shape
        self.passes += len(items)
        forward_only(
            self._chunks,
            self._groups,
            lambda item: self._start(order, item, inputs[item]),
            lambda item, hidden: self._send(order, item, hidden, *inputs[item][2:]),
            items,
            seq_length=seq_length,
            micro_batch_size=rows,
        )

    def _inputs(self, order: Order, item: Item) -> tuple[Tensor, Tensor, Tensor, int]:
        """Token ids, position ids, chunk identities and hash of a micro-batch."""
        if order.inputs is not None:
            place = (item.data_rank, item.micro_batch)
            tokens, positions = order.inputs[place].to(self._device)
            return tokens, positions, order.chunks[place], int(order.hashes[place])
        batch = self._batches.read(order.position, item)
        moved = batch.to(self._device)
        return moved.tokens, moved.position_ids, self._batches.identities(batch), batch.key

    def _start(self, order: Order, item: Item, inputs: tuple[Tensor, Tensor, Tensor, int]) -> tuple[Tensor, Tensor]:
        self.started.append((order.number, item, time.monotonic()))
        return inputs[0], inputs[1]

    def _send(self, order: Order, item: Item, hidden: Tensor, chunks: Tensor, token_hash: int) -> None:
        """Hand a micro-batch over, from every tensor-parallel rank of the last stage to the ranks it serves."""
        content = self._payload.encode(whole_sequence(hidden, self._chunks[-1], self._groups), chunks)
        header = Header(order.number, item.micro_batch, token_hash).tensor(self._device)
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
