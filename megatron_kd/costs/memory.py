"""Memory of a rank, part by part: arithmetic on the layout that training uses. Tests compare it with tensors' bytes.

Student: weights, fp32 gradients and optimizer state as Megatron-Core's DDP and distributed optimizer hold them (under
bf16, fp32 master weights beside the two Adam moments, sharded over data parallelism); the activations that autograd
keeps for the micro-batches in flight, without recomputation; the fused loss's logit tiles and the gradient of its
hidden states.

Teacher, co-located: its weights, the transient activations of one pass, and the hidden states that wait on the
student's last stage. Remote: on the student's last stage its output layer (for the payload ``hidden``) and the
hand-offs being received; on its own ranks weights, the activations of a pass, and the hand-offs waiting to be sent.

Not counted: the CUDA context, NCCL buffers and fragmentation, for which ``plan.usable_memory`` leaves room.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = 4
ADAM_BYTES = 8
MASTER_BYTES = {"fp32": 0, "bf16": 4}
VOCABULARY_MULTIPLE = 128
LOSS_TILE_BYTES = {"cuda": 896 << 20, "cpu": 1280 << 20}
"""Default budget of losses/fused_linear.py; a test compares them."""
LOGIT_BYTES = 4
LOSS_TEMPORARY_BYTES = 32 << 20
STASH_BYTES = 1024 << 20
"""Default of ``teacher.stash_megabytes``."""
PASSES_PER_STAGE = 2
"""Constant of teachers/colocated.py; a test compares them."""
BYTES_PER_ENTRY = 8
"""Bytes of one id of a sparse payload: an int32 id and an fp32 weight."""
TAIL_BYTES = 4
"""Bytes of the tail mass of one token of a sparse payload."""

# Tensors that autograd keeps for one layer's backward pass, in units of [positions, width].
HIDDEN_REPLICATED = 4  # inputs and outputs of both norms
ATTENTION_QUERY = 2  # the rotated query, the context
FFN_FUSED, FFN_UNFUSED = 3, 4  # [gate, up] and their product; unfused: silu(gate) as well


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    loss: float = 0
    teacher_weights: float = 0
    teacher_activations: float = 0

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: "RankMemory") -> "RankMemory":
        return RankMemory(
            **{part.name: getattr(self, part.name) + getattr(other, part.name) for part in fields(RankMemory)}
        )


def padded_rows(vocab_size: int, tensor: int) -> int:
    """Return the rows of the embedding over all tensor-parallel ranks (``padded_vocab_size`` of models/gpt.py)."""
    multiple = VOCABULARY_MULTIPLE * tensor
    return math.ceil(vocab_size / multiple) * multiple


def rank_parameters(
    architecture: ModelArchitecture, layout: ParallelLayout, stage: int, layers: Sequence[int] | None = None
) -> int:
    """Count the parameters on one rank of pipeline stage ``stage``.

    Both ends of a pipeline hold the embedding of a tied model.

    Args:
        layers: layers of every stage; None for an even split.
    """
    a, tp = architecture, layout.tensor
    own_layers = layers[stage] if layers else a.num_layers // layout.pipeline
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    sharded = a.hidden_size * (queries + 2 * keys) + queries * a.hidden_size + 3 * a.hidden_size * a.ffn_hidden_size
    if a.add_qkv_bias:
        sharded += queries + 2 * keys
    total = own_layers * (sharded // tp + 2 * a.hidden_size + (2 * a.head_dim if a.qk_layernorm else 0))
    vocabulary = padded_rows(a.vocab_size, tp) // tp * a.hidden_size
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        total += vocabulary
    if last:
        total += a.hidden_size + (0 if first and a.tie_word_embeddings else vocabulary)
    return total


def layer_activation_bytes(
    architecture: ModelArchitecture, layout: ParallelLayout, positions: int, precision: str, fused: bool
) -> float:
    """Return what autograd keeps on a rank for one layer and one micro-batch of ``positions`` tokens."""
    a, tp = architecture, layout.tensor
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    replicated = HIDDEN_REPLICATED * a.hidden_size / (tp if layout.sequence_parallel else 1)
    if layout.context == 1:
        # The value is a view of the whole [query, key, value] product, which it keeps alive; the rotated key is a copy.
        attention = (ATTENTION_QUERY * queries + keys + (queries + 2 * keys)) / tp
    else:
        # The halves of the context as well as the whole; keys and values of all ranks (models/attention.py).
        attention = ((ATTENTION_QUERY + 1) * queries + layout.context * 2 * keys) / tp
    ffn = (FFN_FUSED if fused else FFN_UNFUSED) * a.ffn_hidden_size / tp
    return positions / layout.context * (replicated + attention + ffn) * ELEMENT_BYTES[precision]


def in_flight_layers(
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    stage: int,
    micro_batches: int,
    layers: Sequence[int] | None = None,
) -> int:
    """Count the layers times micro-batches whose activations a stage holds at once under 1F1B, interleaved or not."""
    own = layers[stage] if layers else architecture.num_layers // layout.pipeline
    remaining = layout.pipeline - stage
    if layout.virtual_pipeline is None:
        return own * min(remaining, micro_batches)
    model_chunks = 2 * (remaining - 1) + (layout.virtual_pipeline - 1) * layout.pipeline + 1
    return own // layout.virtual_pipeline * min(model_chunks, micro_batches * layout.virtual_pipeline)


def loss_tile_bytes(
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    tokens: float,
    precision: str,
    models: int,
    device: str = "cuda",
    budget: int | None = None,
) -> float:
    """Return the size of the fused loss's logit buffers: fp32, and under bf16 the bf16 product beside it.

    Args:
        models: how many output layers the loss computes: 1, or 2 with a dense teacher.
        budget: bytes that the loss may use; None for the device's default.
    """
    budget = budget or LOSS_TILE_BYTES[device]
    per_logit = LOGIT_BYTES * models + (ELEMENT_BYTES["bf16"] if precision == "bf16" else 0)
    whole = tokens * padded_rows(architecture.vocab_size, layout.tensor) / layout.tensor * per_logit
    return min(whole, budget - min(budget // 4, LOSS_TEMPORARY_BYTES))


def student_memory(
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    stage: int,
    *,
    precision: str,
    micro_batch_size: int,
    seq_length: int,
    micro_batches: int,
    layers: Sequence[int] | None = None,
    models_in_loss: int = 1,
    fused: bool = True,
    device: str = "cuda",
    loss_tile_budget: int | None = None,
) -> RankMemory:
    """Return the student's memory on one rank of ``stage``."""
    a, width = architecture, ELEMENT_BYTES[precision]
    parameters = rank_parameters(a, layout, stage, layers)
    positions = micro_batch_size * seq_length
    shards = layout.data * layout.context
    alive = in_flight_layers(a, layout, stage, micro_batches, layers)
    activations = alive * layer_activation_bytes(a, layout, positions, precision, fused)
    loss = 0.0
    if stage == layout.pipeline - 1:
        tokens = positions / layout.context
        hidden = tokens * a.hidden_size * width
        activations += hidden  # input of the final norm
        loss = 2 * hidden + loss_tile_bytes(a, layout, tokens, precision, models_in_loss, device, loss_tile_budget)
    return RankMemory(
        weights=parameters * width,
        gradients=parameters * GRADIENT_BYTES,
        optimizer=parameters * (ADAM_BYTES + MASTER_BYTES[precision]) / shards,
        activations=activations,
        loss=loss,
    )


@dataclass(frozen=True)
class PlacedTeacher:
    """A teacher that runs beside a student.

    Attributes:
        layout: the teacher's own, over the student's ranks or over ranks of its own.
        is_remote: whether the ranks are its own.
        payload_ids: ids per token that a remote teacher sends; None where it sends hidden states.
    """

    architecture: ModelArchitecture
    layout: ParallelLayout
    is_remote: bool = False
    payload_ids: int | None = None
    stash_bytes: float = STASH_BYTES
    prefetch_depth: int = 2

    @property
    def is_dense(self) -> bool:
        """Whether the student's last stage computes the teacher's output layer."""
        return self.payload_ids is None

    def hand_off_bytes(self, positions: float, precision: str) -> float:
        """Return the size of the teacher targets for ``positions`` tokens, as they are sent."""
        if self.payload_ids is None:
            return positions * self.architecture.hidden_size * ELEMENT_BYTES[precision]
        return positions * (BYTES_PER_ENTRY * self.payload_ids + TAIL_BYTES)


def teacher_layout(student: ParallelLayout, tensor: int | None, pipeline: int | None) -> ParallelLayout:
    """Return a co-located teacher's layout over the student's ranks; a size of None is the student's.

    Raises:
        LayoutError: its sizes do not divide the ranks.
    """
    tensor, pipeline = tensor or student.tensor, pipeline or student.pipeline
    keys = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=student.sequence_parallel and tensor > 1,
    )
    return ParallelLayout.for_world(keys, student.world_size)


def teacher_memory(
    architecture: ModelArchitecture,
    student: ParallelLayout,
    own: ParallelLayout,
    rank: int,
    *,
    precision: str,
    micro_batch_size: int,
    seq_length: int,
    micro_batches: int,
    stash_bytes: float = STASH_BYTES,
) -> RankMemory:
    """Return a co-located teacher's memory on one rank, in its own layout over the student's ranks.

    Hidden states wait on the student's last stage as far as the stash allows, the rest in host memory. Where the
    layouts differ, that stage holds its part of the teacher's head.
    """
    a, width = architecture, ELEMENT_BYTES[precision]
    positions = micro_batch_size * seq_length
    transient = positions * (2 * a.hidden_size + FFN_FUSED * a.ffn_hidden_size / own.tensor) * width
    kept = head = 0.0
    if student.coordinates(rank).pipeline == student.pipeline - 1:
        hidden = positions * a.hidden_size * width
        waiting = waiting_micro_batches(student, own, hidden, micro_batches, stash_bytes)
        kept = min(hidden / student.context * waiting, stash_bytes)
        if (student.tensor, student.pipeline) != (own.tensor, own.pipeline):
            head = padded_rows(a.vocab_size, student.tensor) / student.tensor * a.hidden_size * width
    return RankMemory(
        teacher_weights=rank_parameters(a, own, own.coordinates(rank).pipeline) * width + head,
        teacher_activations=transient + kept,
    )


def waiting_micro_batches(
    student: ParallelLayout, own: ParallelLayout, hidden_bytes: float, micro_batches: int, stash_bytes: float
) -> int:
    """Count the micro-batches whose hidden states, ``hidden_bytes`` each, wait on the student's last stage at a time.

    Under a pipeline these are a whole step's; otherwise those of one wave, which keeps all of the teacher's replicas
    and stages busy (``teachers/colocated.py``).
    """
    if student.pipeline > 1:
        return micro_batches
    passes = 1 if own.pipeline == 1 else PASSES_PER_STAGE * own.pipeline
    per_replica = min(passes, max(1, int(stash_bytes / 2 / hidden_bytes)))
    return min(micro_batches, max(1, -(-own.data * per_replica // student.data)))


def received_memory(
    student: ModelArchitecture,
    layout: ParallelLayout,
    stage: int,
    teacher: PlacedTeacher,
    *,
    precision: str,
    micro_batch_size: int,
    seq_length: int,
) -> RankMemory:
    """Return what a remote teacher's targets occupy on a rank of the student; zero before the last stage."""
    if stage < layout.pipeline - 1:
        return RankMemory()
    rows = padded_rows(student.vocab_size, layout.tensor) // layout.tensor
    head = rows * teacher.architecture.hidden_size * ELEMENT_BYTES[precision] if teacher.is_dense else 0
    hand_off = teacher.hand_off_bytes(micro_batch_size * seq_length, precision)
    return RankMemory(teacher_weights=head, teacher_activations=teacher.prefetch_depth * hand_off)


def remote_rank_memory(
    teacher: PlacedTeacher, rank: int, *, precision: str, micro_batch_size: int, seq_length: int
) -> RankMemory:
    """Return the memory of one of a remote teacher's own ranks: weights, one pass, hand-offs waiting to be sent.

    The logits from which a sparse payload is selected are not counted.
    """
    own = teacher.layout
    alone = teacher_memory(
        teacher.architecture,
        own,
        own,
        rank,
        precision=precision,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        micro_batches=1,
        stash_bytes=0,
    )
    if own.coordinates(rank).pipeline < own.pipeline - 1:
        return alone
    waiting = teacher.prefetch_depth * teacher.hand_off_bytes(micro_batch_size * seq_length, precision)
    return dataclasses.replace(alone, teacher_activations=alone.teacher_activations + waiting)


def stage_memory(
    student: ModelArchitecture,
    layout: ParallelLayout,
    stage: int,
    teacher: PlacedTeacher | None,
    loss_tile_budget: int | None = None,
    **sizes: Any,
) -> RankMemory:
    """Return the memory of the fullest rank of the student's ``stage``, with what the teacher holds there.

    Args:
        sizes: ``precision``, ``micro_batch_size``, ``seq_length`` and ``micro_batches``.
    """
    alone = student_memory(
        student,
        layout,
        stage,
        layers=layout.stage_layers(student.num_layers),
        models_in_loss=2 if teacher is not None and teacher.is_dense else 1,
        loss_tile_budget=loss_tile_budget,
        **sizes,
    )
    if teacher is None:
        return alone
    if teacher.is_remote:
        batch_sizes = {name: value for name, value in sizes.items() if name != "micro_batches"}
        return alone + received_memory(student, layout, stage, teacher, **batch_sizes)
    own = teacher.layout
    ranks: Iterable[int] = (rank for rank in range(layout.world_size) if layout.coordinates(rank).pipeline == stage)
    if (layout.tensor, layout.pipeline) == (own.tensor, own.pipeline) and layout.context == 1:
        ranks = [min(ranks)]  # All ranks of a stage are alike.
    held = (
        teacher_memory(teacher.architecture, layout, own, rank, stash_bytes=teacher.stash_bytes, **sizes)
        for rank in ranks
    )
    return alone + max(held, key=lambda memory: memory.total)
