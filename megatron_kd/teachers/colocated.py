"""A teacher on the student's ranks, with a parallel layout of its own.

    begin_step   token ids of all data-parallel ranks to all of them
    a wave       the teacher's forward-only schedule over some rounds (round m: micro-batch m of every data-parallel
                 rank), then hidden states [s, b, h_teacher] from its last stage to the student's
    knowledge    hidden states out of the stash, and the output weight, resharded once to the student's layout

A student without a pipeline asks for micro-batches on all ranks alike, so waves run just in time, as small as keeps
every replica and stage busy. Inside a pipelined student's schedule a teacher pass would wait for ranks that wait for
it: there all waves of a step run first. Hidden states that wait for the student stay on the device up to a budget, and
go to host memory beyond it.
"""

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.errors import LayoutError
from megatron_kd.generation.decoder import Decoder
from megatron_kd.losses.types import DenseKnowledge, OutputHead
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import create_process_groups, is_last_stage
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.interface import Announced, Decision, Teacher
from megatron_kd.teachers.placements import StudentRun, load_teacher, plan_teacher
from megatron_kd.teachers.routing import Carrier, GroupCarrier, Item, Routing, Transfer, reshard_head, whole_sequence
from megatron_kd.teachers.teacher_config import TeacherConfig

PASSES_PER_STAGE = 2  # micro-batches per wave and pipeline stage of the teacher: its bubble is then a third


def build(config: TeacherConfig, run: StudentRun, groups: ProcessGroupCollection) -> "ColocatedTeacher":
    """Build a teacher on the student's ranks; see :func:`megatron_kd.teachers.placements.build_teacher`."""
    plan, ranks = plan_teacher(config, run), range(run.layout.world_size)
    routing = Routing(run.layout, plan.layout, ranks, ranks)
    shares_groups = routing.shares_stages and run.layout.context == 1
    teacher_groups = groups if shares_groups else create_process_groups(plan.layout)
    moves_nothing = shares_groups and run.head_rows == plan.head_rows
    carrier = None if moves_nothing else GroupCarrier(dist.new_group(list(ranks)))
    model_chunks = load_teacher(plan, run, teacher_groups)
    head = reshard_head(
        model_chunks[-1].output_head() if is_last_stage(teacher_groups) else None,
        routing,
        carrier,
        student_rows=run.head_rows,
        teacher_rows=plan.head_rows,
        valid_vocab_size=plan.info.architecture.vocab_size,
        hidden_size=plan.info.architecture.hidden_size,
        like=next(model_chunks[0].parameters()),
    )
    return ColocatedTeacher(
        model_chunks,
        teacher_groups,
        student_groups=groups,
        routing=routing,
        head=head if is_last_stage(groups) else None,
        stash_bytes=config.stash_megabytes << 20,
        carrier=carrier,
    )


class ColocatedTeacher(Teacher):
    """Dense knowledge from a frozen model on the student's ranks.

    Args:
        model_chunks: the teacher's model chunks on this rank, weights loaded.
        groups: process groups of the teacher's layout.
        student_groups: process groups of the student's layout.
        routing: both layouts over the ranks of the world.
        head: the teacher's output layer for this rank's interval of ids, on the student's last stage; None elsewhere.
        stash_bytes: hidden states that may be kept on a device; a wave makes at most half as many.
        carrier: moves tensors between all ranks; None where none move.
    """

    def __init__(
        self,
        model_chunks: Sequence[HiddenStateGPTModel],
        groups: ProcessGroupCollection,
        *,
        student_groups: ProcessGroupCollection,
        routing: Routing,
        head: OutputHead | None,
        stash_bytes: int = 1 << 30,
        carrier: Carrier | None = None,
    ):
        for model_chunk in model_chunks:
            model_chunk.requires_grad_(False)
            model_chunk.eval()
        self._model_chunks = list(model_chunks)
        self._groups, self._student_groups, self._head = groups, student_groups, head
        self._routing, self._carrier = routing, carrier
        self._budget = stash_bytes
        self.stash = Stash(stash_bytes - stash_bytes // 2)
        self.passes = 0
        """Micro-batches that went through this rank's layers."""
        self._position = 0
        self._inputs: dict[Item, tuple[Tensor, Tensor]] = {}
        self._announced = Announced(())
        self._next_round = 0

    def begin_step(self, batches: Sequence[Batch], *, scheduled: bool = True) -> None:
        """Make the step's token ids known to all ranks; run all its passes ahead of a pipelined student."""
        self.stash.clear()
        self._announced = Announced(batches)
        self._inputs = self._gather(batches)
        self._next_round = 0
        while self._routing.student.pipeline > 1 and self._next_round < len(batches):
            self._run_wave()

    def decoder(self, groups: ProcessGroupCollection, rows: int, length: int, vocab_size: int) -> Decoder:
        """See :class:`~megatron_kd.teachers.interface.Teacher`."""
        if self._groups is not groups:
            raise LayoutError(
                "generating with the teacher needs the student's layout: leave teacher.tensor_model_parallel_size and "
                "teacher.pipeline_model_parallel_size unset"
            )
        return Decoder(self._model_chunks, groups, rows, length, vocab_size)

    def knowledge(self, batch: Batch) -> DenseKnowledge | None:
        """Return hidden states [tokens, h_teacher] of this rank's positions in sequence-major order, with the head.

        None before the student's last stage.
        """
        if self._head is None:
            return None
        number = self._announced.take(batch)
        while number >= self._next_round:
            self._run_wave()
        return DenseKnowledge(hidden=self.stash.take(number).flatten(0, 1), head=self._head)

    def follow(self, decision: Decision) -> None:
        """Note which global batch follows, since it decides which replica computes what."""
        self._position = decision.position

    def _run_wave(self) -> None:
        """Run the teacher on the next rounds and bring their hidden states to the student's last stage."""
        stop = min(self._next_round + self._rounds_per_wave(), len(self._announced))
        items = self._routing.items(range(self._next_round, stop))
        self._next_round = stop
        own = [item for item in items if self._replica_of(item) == self._groups.dp.rank()]
        self._deliver(items, dict(zip(own, self._forward(own) if own else [])))

    def _rounds_per_wave(self) -> int:
        student, teacher = self._routing.student, self._routing.teacher
        tokens = next(iter(self._inputs.values()))[0]
        config = self._model_chunks[0].config
        item_bytes = tokens.numel() * config.hidden_size * config.params_dtype.itemsize
        within_budget = max(1, self._budget // 2 // item_bytes)  # micro-batches of a replica
        wanted = 1 if teacher.pipeline == 1 else PASSES_PER_STAGE * teacher.pipeline
        of_a_replica = within_budget if student.pipeline > 1 else min(wanted, within_budget)
        return max(1, -(-teacher.data * of_a_replica // student.data))

    def _replica_of(self, item: Item) -> int:
        return self._routing.replica(self._position, item, len(self._announced))

    @torch.no_grad()
    def _forward(self, items: Sequence[Item]) -> list[Tensor]:
        """Return the hidden states of ``items`` on the teacher's last stage; nothing elsewhere."""
        self.passes += len(items)
        rows, seq_length = self._inputs[items[0]][0].shape
        return forward_only(
            self._model_chunks,
            self._groups,
            self._inputs.__getitem__,
            lambda _, hidden: whole_sequence(hidden, self._model_chunks[-1], self._groups),
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
            assert self._carrier is not None
            self._carrier.exchange(transfers)
        for item, states in arrived.items():
            self.stash.put(item.micro_batch, states)

    def _buffer(self, item: Item) -> Tensor:
        tokens = self._inputs[item][0]
        config = self._model_chunks[0].config
        shape = (tokens.shape[1] // self._routing.student.context, tokens.shape[0], config.hidden_size)
        return torch.empty(shape, dtype=config.params_dtype, device=tokens.device)

    def _gather(self, batches: Sequence[Batch]) -> dict[Item, tuple[Tensor, Tensor]]:
        """Return token and position ids of every micro-batch that this rank's replica may compute."""
        group = self._student_groups.dp
        own = torch.stack([torch.stack([batch.tokens, batch.position_ids]) for batch in batches])
        if group.size() == 1 or self._routing.shares_stages:
            return {Item(m, group.rank()): (ids[0], ids[1]) for m, ids in enumerate(own)}
        own = own.int()
        everyone = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(everyone, own, group=group)
        return {Item(m, d): (ids[0], ids[1]) for d, step in enumerate(everyone) for m, ids in enumerate(step.long())}


class Stash:
    """Tensors by key, each put once and taken once.

    Args:
        device_bytes: limit for what is kept on the device. Beyond it a tensor is copied to the host (pinned and
            asynchronously from CUDA), and back when it is taken.
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
        """Remove the tensor of ``key`` and return it, on the device that it came from."""
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
        """Drop all tensors."""
        self._kept.clear()
        self._on_device.clear()
        self.device_bytes = self.host_bytes = 0
