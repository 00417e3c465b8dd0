"""What a layout costs beyond the work itself: the pipeline's bubble, stages of unequal work, and communication.

FLOPs are counted as in costs/flops.py: 2 per parameter and token forward, 6 forward and backward. The input embedding
is a lookup and costs a stage nothing, so balance counts layers and output layers only; the last stage computes the
student's and may compute the teacher's.

Communication is the bytes that a rank sends in one training step with ring collectives: an all-reduce of n bytes over
k ranks sends 2 n (k - 1) / k, a reduce-scatter or all-gather n (k - 1) / k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_kd.costs.memory import ELEMENT_BYTES, GRADIENT_BYTES, PlacedTeacher, padded_rows, rank_parameters
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelLayout

COLLECTIVES_PER_LAYER = 2  # attention and feed-forward, in each direction
LOSS_VALUES_PER_TOKEN = 6  # statistics of the fused loss, fp32 (docs/losses.md)


def bubble_fraction(pipeline: int, micro_batches: int, virtual: int | None = None) -> float:
    """Return the share of a step in which a stage waits: (p - 1) / (v · m + p - 1).

    p is the number of stages, m of micro-batches, v of model chunks per stage.
    """
    return (pipeline - 1) / ((virtual or 1) * micro_batches + pipeline - 1)


def layer_flops(student: ModelArchitecture) -> float:
    """Return the forward and backward FLOPs per token of one layer."""
    return 6 * (student.non_embedding_parameters - student.hidden_size) / student.num_layers


def student_head_flops(student: ModelArchitecture) -> float:
    """Return the forward and backward FLOPs per token of the student's output layer."""
    return 6 * student.vocab_size * student.hidden_size


def teacher_head_flops(teacher: ModelArchitecture) -> float:
    """Return the FLOPs per token of the teacher's output layer, which the student's last stage computes if dense."""
    return 2 * teacher.vocab_size * teacher.hidden_size


@dataclass(frozen=True)
class LayerSplit:
    """The layers of every pipeline stage.

    Attributes:
        layers: one number per stage.
        slowest: FLOPs per token of the slowest stage over the mean of all stages; 1 is perfect balance.
    """

    layers: tuple[int, ...]
    slowest: float

    @property
    def keys(self) -> tuple[str, ...]:
        """Overrides that configure this split; none where all stages have equally many layers."""
        if len(set(self.layers)) == 1:
            return ()
        return (
            f"parallel.num_layers_in_first_pipeline_stage={self.layers[0]}",
            f"parallel.num_layers_in_last_pipeline_stage={self.layers[-1]}",
        )


def layer_split(
    student: ModelArchitecture, dense_teacher: ModelArchitecture | None, layers: Sequence[int]
) -> LayerSplit:
    """Return the split with its balance.

    Args:
        dense_teacher: a teacher whose output layer the student's last stage computes, or None.
    """
    heads = student_head_flops(student) + (teacher_head_flops(dense_teacher) if dense_teacher else 0)
    stages = [count * layer_flops(student) for count in layers]
    stages[-1] += heads
    return LayerSplit(tuple(layers), max(stages) / (sum(stages) / len(stages)))


def balanced_split(
    student: ModelArchitecture, dense_teacher: ModelArchitecture | None, pipeline: int, virtual: int | None = None
) -> LayerSplit:
    """Return the split whose slowest stage is fastest, among those that the ``parallel.*`` keys can express.

    The first and the last stage may have any number of layers, the stages between them have equally many; under
    interleaving each number divides by the number of virtual stages.
    """
    splits = (
        layer_split(student, dense_teacher, layers)
        for layers in expressible_splits(student.num_layers, pipeline, virtual or 1)
    )
    return min(splits, key=lambda split: (split.slowest, max(split.layers)))


def expressible_splits(total: int, pipeline: int, virtual: int = 1) -> Iterator[tuple[int, ...]]:
    """Yield every split of ``total`` layers that the ``parallel.*`` keys can express (:func:`balanced_split`)."""
    if pipeline == 1:
        yield (total,)
        return
    between = pipeline - 2
    for first in range(virtual, total, virtual):
        for last in range(virtual, total - first + 1, virtual):
            rest = total - first - last
            if rest == 0 and between == 0:
                yield (first, last)
            elif between and rest and rest % (between * virtual) == 0:
                yield (first, *[rest // between] * between, last)


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that a rank sends in one step.

    Attributes:
        tensor: all-reduces of activations (under sequence parallelism their scatter and gather) and of the loss.
        pipeline: activations forward and their gradients backward; the gradient of an embedding that both ends hold.
        data: gradients reduced, weights gathered.
        context: keys and values gathered, their gradients scattered.
        hand_off: teacher targets that a rank of the student's last stage receives from other ranks.
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
    """Return what the busiest of the student's ranks sends, the passes of a co-located teacher included."""
    width = ELEMENT_BYTES[precision]
    positions = micro_batch_size * seq_length / layout.context * micro_batches
    stage_layers = layout.stage_layers(student.num_layers)
    layers = max(stage_layers)
    hidden = positions * student.hidden_size * width
    shards = layout.data * layout.context
    parameters = max(rank_parameters(student, layout, stage, stage_layers) for stage in range(layout.pipeline))
    key_value = 2 * student.num_query_groups * student.head_dim / layout.tensor
    context = 2 * (layout.context - 1) * positions * key_value * width * layers if layout.context > 1 else 0.0
    by_teacher = _teacher_traffic(layout, teacher, positions, precision)
    return StepTraffic(
        tensor=2 * _ring(layout.tensor) * (_reductions(stage_layers) * hidden + LOSS_VALUES_PER_TOKEN * 4 * positions)
        + by_teacher.tensor,
        pipeline=_pipeline_traffic(student, layout, hidden) + by_teacher.pipeline,
        data=_ring(shards) * parameters * (GRADIENT_BYTES + width),
        context=context,
        hand_off=by_teacher.hand_off,
    )


def _reductions(stage_layers: Sequence[int]) -> int:
    """Count the tensor-parallel reductions of hidden states that the busiest stage makes for a micro-batch.

    They are those of its layers in both directions, of the embedding's output, and of the gradient of the output
    layer's input.
    """
    last = len(stage_layers) - 1
    return max(
        2 * COLLECTIVES_PER_LAYER * layers + (stage == 0) + (stage == last) for stage, layers in enumerate(stage_layers)
    )


def _pipeline_traffic(student: ModelArchitecture, layout: ParallelLayout, hidden: float) -> float:
    """Return what the busiest stage sends over the pipeline, given the bytes of a step's hidden states.

    Every stage but the last sends hidden states forward, every stage but the first gradients backward. Both ends hold
    a tied embedding and reduce its gradient.
    """
    if layout.pipeline == 1:
        return 0.0
    message = hidden / (layout.tensor if layout.sequence_parallel else 1)
    middle, end = 2 * (layout.virtual_pipeline or 1), 2 * (layout.virtual_pipeline or 1) - 1
    rows = padded_rows(student.vocab_size, layout.tensor) / layout.tensor
    embedding = 2 * _ring(2) * rows * student.hidden_size * GRADIENT_BYTES if student.tie_word_embeddings else 0.0
    return max(end * message + embedding, middle * message if layout.pipeline > 2 else 0.0)


def _teacher_traffic(
    layout: ParallelLayout, teacher: PlacedTeacher | None, positions: float, precision: str
) -> StepTraffic:
    """Return the teacher's part of the traffic, for ``positions`` of a data-parallel rank of the student."""
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
        data=0.0,
        context=0.0,
        hand_off=hand_off if elsewhere else 0.0,
    )


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
