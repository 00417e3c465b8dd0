"""Bytes that a rank sends in one training step, by dimension, with ring collectives: an all-reduce of n bytes over k
ranks sends 2 n (k - 1) / k, a reduce-scatter or all-gather n (k - 1) / k."""

from dataclasses import dataclass

from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.planning.memory import ELEMENT_BYTES, GRADIENT_BYTES, rank_parameters

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
        hand_off: hidden states of a remote teacher, received by a rank of the last stage.
    """

    tensor: float
    pipeline: float
    data: float
    context: float
    hand_off: float


def step_traffic(
    student: ModelArchitecture,
    teacher: ModelArchitecture | None,
    layout: ParallelLayout,
    *,
    precision: str,
    micro_batch_size: int,
    seq_length: int,
    micro_batches: int,
    remote_teacher: bool,
) -> StepTraffic:
    """What the busiest rank sends; a co-located teacher's forward passes are counted with the student's."""
    width = ELEMENT_BYTES[precision]
    positions = micro_batch_size * seq_length / layout.context * micro_batches
    layers = student.num_layers // layout.pipeline
    hidden = positions * student.hidden_size * width
    tensor = 2 * _ring(layout.tensor) * COLLECTIVES_PER_LAYER * 2 * layers * hidden
    tensor += 2 * _ring(layout.tensor) * LOSS_VALUES_PER_TOKEN * 4 * positions
    if teacher is not None and not remote_teacher:
        teacher_hidden = positions * teacher.hidden_size * width
        teacher_layers = teacher.num_layers // layout.pipeline
        tensor += 2 * _ring(layout.tensor) * COLLECTIVES_PER_LAYER * teacher_layers * teacher_hidden
    split = layout.tensor if layout.sequence_parallel else 1
    boundary = hidden / split * (2 if layout.pipeline > 1 else 0) * (layout.virtual_pipeline or 1)
    shards = layout.data * layout.context
    parameters = max(rank_parameters(student, layout, stage) for stage in range(layout.pipeline))
    key_value = 2 * student.num_query_groups * student.head_dim / layout.tensor
    context = 2 * (layout.context - 1) * positions * key_value * width * layers if layout.context > 1 else 0.0
    return StepTraffic(
        tensor=tensor,
        pipeline=boundary,
        data=_ring(shards) * parameters * (GRADIENT_BYTES + width),
        context=context,
        hand_off=positions * teacher.hidden_size * width if teacher is not None and remote_teacher else 0.0,
    )


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
