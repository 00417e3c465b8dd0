"""Bytes that a rank sends in one training step, by dimension, with ring collectives: an all-reduce of n bytes over k
ranks sends 2 n (k - 1) / k, a reduce-scatter or all-gather n (k - 1) / k."""

from dataclasses import dataclass

from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.planning.memory import ELEMENT_BYTES, GRADIENT_BYTES, rank_parameters
from megatron_kd.planning.teacher_memory import PlacedTeacher

COLLECTIVES_PER_LAYER = 2  # attention and feed-forward, in each direction
LOSS_VALUES_PER_TOKEN = 6  # statistics of the fused loss, fp32 (docs/losses.md)


@dataclass(frozen=True)
class StepTraffic:
    """Bytes a rank sends a step.

    Attributes:
        tensor: all-reduces of activations (or their scatter and gather under sequence parallelism), and the loss's.
        pipeline: activations forward and their gradients backward.
        data: gradients reduced, weights gathered.
        context: keys and values gathered, their gradients scattered.
        hand_off: a teacher's knowledge from other ranks, received by a rank of the student's last stage.
    """

    tensor: float
    pipeline: float
    data: float
    context: float
    hand_off: float


def step_traffic(
    student: ModelArchitecture,
    layout: ParallelLayout,
    teacher: PlacedTeacher | None,
    *,
    precision: str,
    micro_batch_size: int,
    seq_length: int,
    micro_batches: int,
) -> StepTraffic:
    """What the busiest of the student's ranks sends; a co-located teacher's forward passes are among it."""
    width = ELEMENT_BYTES[precision]
    positions = micro_batch_size * seq_length / layout.context * micro_batches
    stage_layers = layout.stage_layers(student.num_layers)
    layers = max(stage_layers)
    hidden = positions * student.hidden_size * width
    split = layout.tensor if layout.sequence_parallel else 1
    boundary = hidden / split * (2 if layout.pipeline > 1 else 0) * (layout.virtual_pipeline or 1)
    shards = layout.data * layout.context
    parameters = max(rank_parameters(student, layout, stage, stage_layers) for stage in range(layout.pipeline))
    key_value = 2 * student.num_query_groups * student.head_dim / layout.tensor
    context = 2 * (layout.context - 1) * positions * key_value * width * layers if layout.context > 1 else 0.0
    of_teacher = _teacher_traffic(layout, teacher, positions, precision)
    return StepTraffic(
        tensor=2 * _ring(layout.tensor) * (COLLECTIVES_PER_LAYER * 2 * layers * hidden
                                           + LOSS_VALUES_PER_TOKEN * 4 * positions) + of_teacher.tensor,
        pipeline=boundary + of_teacher.pipeline,
        data=_ring(shards) * parameters * (GRADIENT_BYTES + width),
        context=context,
        hand_off=of_teacher.hand_off,
    )


def _teacher_traffic(
    layout: ParallelLayout, teacher: PlacedTeacher | None, positions: float, precision: str
) -> StepTraffic:
    """A teacher's part, for ``positions`` of a data-parallel rank of the student."""
    if teacher is None:
        return StepTraffic(0.0, 0.0, 0.0, 0.0, 0.0)
    hand_off = teacher.hand_off_bytes(positions, precision)
    if teacher.is_remote:
        return StepTraffic(0.0, 0.0, 0.0, 0.0, hand_off)
    own, architecture = teacher.layout, teacher.architecture
    hidden = positions * layout.data / own.data * architecture.hidden_size * ELEMENT_BYTES[precision]
    layers = max(own.stage_layers(architecture.num_layers))
    elsewhere = (own.tensor, own.pipeline) != (layout.tensor, layout.pipeline)
    return StepTraffic(
        tensor=2 * _ring(own.tensor) * COLLECTIVES_PER_LAYER * layers * hidden,
        pipeline=hidden / (own.tensor if own.sequence_parallel else 1) if own.pipeline > 1 else 0.0,
        data=0.0, context=0.0, hand_off=hand_off if elsewhere else 0.0,
    )


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
