"""A teacher on the student's ranks, with a parallel layout of its own.

    begin_step   token ids of all data-parallel ranks to all of them
    a wave       teacher's forward-only schedule over some rounds (round m: micro-batch m of every data-parallel rank),
                 then hidden states [s, b, h_teacher] from its last stage to the student's
    knowledge    hidden states out of the stash, and the output weight, sharded once by the student's intervals

A student without a pipeline asks for micro-batches on all ranks alike, so waves run just in time, as small as keeps
every replica and stage busy. Inside a pipelined student's schedule a teacher pass would wait for ranks that wait for
it: there all waves of a step run first, and what the budget does not hold on the device waits in host memory.

Hidden states that wait for the student: on the device up to a budget, in host memory beyond it.
"""

from typing import Hashable, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.errors import LayoutError
from megatron_kd.generation.decoder import Decoder
from megatron_kd.losses import DenseKnowledge, OutputHead
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.interface import Announced, Decision
from megatron_kd.teachers.remote.routing import Item, Routing
from megatron_kd.teachers.remote.transport import Carrier, Transfer, reshard_head

PASSES_A_STAGE = 2  # micro-batches a wave for each pipeline stage of the teacher: its bubble is then a third


class ColocatedTeacher:
    """Dense knowledge from a frozen model on the student's ranks.

    Args:
        chunks: the teacher's model chunks on this rank, weights loaded.
        groups: process groups of the teacher's layout.
        student_groups: those of the student's.
        routing: both layouts over the ranks of the world.
        student_rows: rows of the student's output weight on a tensor-parallel rank.
        stash_bytes: hidden states that may be kept on a device; a wave makes at most half as many.
        carrier: what moves tensors between all ranks; None where none move.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenStateGPTModel],
        groups: ProcessGroupCollection,
        *,
        student_groups: ProcessGroupCollection,
        routing: Routing,
        student_rows: int,
        stash_bytes: int = 1 << 30,
        carrier: Carrier | None = None,
    ):
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self._chunks = list(chunks)
        self._groups, self._student_groups = groups, student_groups
        self._routing, self._carrier = routing, carrier
        self._budget = stash_bytes
        self.stash = Stash(stash_bytes - stash_bytes // 2)
        self.passes = 0
        """Micro-batches that went through this rank's layers."""
        self._position = 0
        self._inputs: dict[Item, tuple[Tensor, Tensor]] = {}
        self._announced: Announced = Announced(())
        self._next_round = 0
        self._head = self._student_head(student_rows)

    def begin_step(self, batches: Sequence[Batch], *, scheduled: bool = True) -> None:
        """Make the step's token ids known to all ranks; run all its passes ahead of a pipelined student."""
        self.stash.clear()
        self._announced = Announced(batches)
        self._inputs = self._gather(batches)
        self._next_round = 0
        while self._routing.student.pipeline > 1 and self._next_round < len(batches):
            self._run_wave()

    def decoder(self, groups: ProcessGroupCollection, rows: int, length: int, vocab_size: int) -> Decoder:
        """For text that the teacher writes on the student's ranks ``groups``.

        Raises:
            LayoutError: the teacher's layout is not the student's, so that its logits are on other ranks.
        """
        if self._groups is not groups:
            raise LayoutError(
                "text of the teacher needs the student's own layout: leave teacher.tensor_model_parallel_size and "
                "teacher.pipeline_model_parallel_size unset"
            )
        return Decoder(self._chunks, groups, rows, length, vocab_size)

    def knowledge(self, batch: Batch) -> DenseKnowledge | None:
        """Hidden states [tokens, h_teacher] of this rank's positions in sequence-major order, and the teacher's head;
        None before the last stage."""
        if self._head is None:
            return None
        number = self._announced.take(batch)
        while number >= self._next_round:
            self._run_wave()
        return DenseKnowledge(hidden=self.stash.take(number).flatten(0, 1), head=self._head)

    def follow(self, decision: Decision) -> None:
        """Take up the global batch that follows; all else runs where the loop runs."""
        self._position = decision.position

    def _run_wave(self) -> None:
        """The next rounds: teacher passes, then their hidden states to the student's last stage."""
        stop = min(self._next_round + self._rounds_a_wave(), len(self._announced))
        items = self._routing.items(range(self._next_round, stop))
        self._next_round = stop
        own = [item for item in items if self._replica_of(item) == self._groups.dp.rank()]
        self._deliver(items, dict(zip(own, self._forward(own) if own else [])))

    def _rounds_a_wave(self) -> int:
        student, teacher = self._routing.student, self._routing.teacher
        tokens = next(iter(self._inputs.values()))[0]
        item_bytes = tokens.numel() * self._chunks[0].config.hidden_size * self._chunks[0].config.params_dtype.itemsize
        within_budget = max(1, self._budget // 2 // item_bytes)  # micro-batches of a replica
        wanted = 1 if teacher.pipeline == 1 else PASSES_A_STAGE * teacher.pipeline
        of_a_replica = within_budget if student.pipeline > 1 else min(wanted, within_budget)
        return max(1, -(-teacher.data * of_a_replica // student.data))

    def _replica_of(self, item: Item) -> int:
        return self._routing.replica(self._position, item, len(self._announced))

    @torch.no_grad()
    def _forward(self, items: Sequence[Item]) -> list[Tensor]:
        """Hidden states of ``items`` on the teacher's last stage; empty elsewhere."""
        self.passes += len(items)
        rows, seq_length = self._inputs[items[0]][0].shape
        return forward_only(
            self._chunks,
            self._groups,
            self._inputs.__getitem__,
            lambda _, hidden: whole_sequence(hidden, self._chunks[-1], self._groups),
            items,
            seq_length=seq_length,
            micro_batch_size=rows,
        )

    def _deliver(self, items: Sequence[Item], hidden: dict[Item, Tensor]) -> None:
        """Move ``hidden`` from where it was computed to every rank that computes a loss with it."""
        rank, routing = dist.get_rank(), self._routing
        transfers: list[Transfer] = []
        arrived: dict[Item, Tensor] = {}
        for item in items:
            replica = self._replica_of(item)
            for destination in routing.destinations(item.data_rank):
                source, target = routing.source_for(replica, destination), destination.rank
                if rank == source:
                    part = routing.part_for(destination, hidden[item])
                if rank == target:
                    arrived[item] = part if rank == source else self._buffer(item)
                if source != target and rank in (source, target):
                    transfers.append(Transfer(source, target, arrived[item] if rank == target else part))
        if transfers:
            self._carrier.exchange(transfers)
        for item, states in arrived.items():
            self.stash.put(item.micro_batch, states)

    def _buffer(self, item: Item) -> Tensor:
        tokens = self._inputs[item][0]
        config = self._chunks[0].config
        shape = (tokens.shape[1] // self._routing.student.context, tokens.shape[0], config.hidden_size)
        return torch.empty(shape, dtype=config.params_dtype, device=tokens.device)

    def _gather(self, batches: Sequence[Batch]) -> dict[Item, tuple[Tensor, Tensor]]:
        """Token and position ids of every micro-batch that this rank's replica may compute."""
        group = self._student_groups.dp
        own = torch.stack([torch.stack([batch.tokens, batch.position_ids]) for batch in batches])
        if group.size() == 1 or self._routing.shares_stages:
            return {Item(m, group.rank()): (ids[0], ids[1]) for m, ids in enumerate(own)}
        own = own.int()
        everyone = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(everyone, own, group=group)
        return {Item(m, d): (ids[0], ids[1]) for d, step in enumerate(everyone) for m, ids in enumerate(step.long())}

    def _student_head(self, student_rows: int) -> OutputHead | None:
        """The teacher's output layer for this rank's interval of ids; None before the student's last stage."""
        own = self._chunks[-1].output_head() if is_last_stage(self._groups) else None
        head = reshard_head(
            own,
            self._routing,
            self._carrier,
            student_rows=student_rows,
            valid_vocab_size=self._chunks[0].valid_vocab_size,
            hidden_size=self._chunks[0].config.hidden_size,
            like=next(self._chunks[0].parameters()),
        )
        return head if is_last_stage(self._student_groups) else None


def whole_sequence(hidden: Tensor, chunk: HiddenStateGPTModel, groups: ProcessGroupCollection) -> Tensor:
    """[s, b, h] on every tensor-parallel rank."""
    if chunk.config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=groups.tp)
    return hidden


class Stash:
    """Tensors by key, each put once and taken once.

    Args:
        device_bytes: what may be kept on the device at a time. Beyond it a tensor is copied to the host (pinned and
            asynchronously from CUDA) and back when it is taken.
    """

    def __init__(self, device_bytes: int):
        self._budget = device_bytes
        self._kept: dict[Hashable, tuple[Tensor, torch.device]] = {}
        self._on_device: set[Hashable] = set()
        self.device_bytes = self.host_bytes = 0
        self.peak_device_bytes = self.peak_host_bytes = 0

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep ``value`` until it is taken."""
        device, size = value.device, value.numel() * value.element_size()
        if self.device_bytes + size <= self._budget:
            self._on_device.add(key)
            self.device_bytes += size
        else:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=device.type == "cuda")
            value = host.copy_(value, non_blocking=True)
            self.host_bytes += size
        self._kept[key] = (value, device)
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)

    def take(self, key: Hashable) -> Tensor:
        """The tensor of ``key``, on the device that it came from."""
        value, device = self._kept.pop(key)
        size = value.numel() * value.element_size()
        if key in self._on_device:
            self._on_device.remove(key)
            self.device_bytes -= size
        else:
            self.host_bytes -= size
        return value.to(device, non_blocking=True)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._on_device.clear()
        self.device_bytes = self.host_bytes = 0
