"""Where a pipeline loses time: its bubble, and a last stage that carries the heads of student and teacher.

FLOPs are counted as in planning/flops.py: 2 a parameter and token forward, 6 forward and backward. The input embedding
is a lookup and costs a stage nothing, so balance counts layers and heads only.
"""

from dataclasses import dataclass

from megatron_kd.models.architecture import ModelArchitecture


def bubble_fraction(pipeline: int, micro_batches: int, virtual: int | None = None) -> float:
    """Share of a step in which a stage waits: (p - 1) / (v · m + p - 1) for p stages, m micro-batches, v chunks."""
    return (pipeline - 1) / ((virtual or 1) * micro_batches + pipeline - 1)


def layer_flops(student: ModelArchitecture) -> float:
    """Forward and backward FLOPs a token of one layer."""
    return 6 * (student.non_embedding_parameters - student.hidden_size) / student.num_layers


def student_head_flops(student: ModelArchitecture) -> float:
    """Forward and backward FLOPs a token of the student's output layer."""
    return 6 * student.vocab_size * student.hidden_size


def teacher_head_flops(teacher: ModelArchitecture) -> float:
    """FLOPs a token of the teacher's output layer, which dense knowledge makes the student's last stage compute."""
    return 2 * teacher.vocab_size * teacher.hidden_size


@dataclass(frozen=True)
class LayerSplit:
    """Layers of every pipeline stage.

    Attributes:
        layers: one number a stage.
        slowest: FLOPs a token of the slowest stage over the mean of all stages; 1 is perfect balance.
        even_slowest: the same for the even split.
    """

    layers: tuple[int, ...]
    slowest: float
    even_slowest: float


def balanced_split(student: ModelArchitecture, teacher: ModelArchitecture | None, pipeline: int) -> LayerSplit:
    """The split that makes the slowest stage fastest: equal stages, and fewer layers on the last one for the heads.

    ``teacher`` is None where no dense teacher's head is computed on the student's last stage.
    """
    layer, total = layer_flops(student), student.num_layers
    heads = student_head_flops(student) + (teacher_head_flops(teacher) if teacher else 0)
    mean = (total * layer + heads) / pipeline

    def slowest(layers: tuple[int, ...]) -> float:
        return max(max(layers[:-1], default=0) * layer, layers[-1] * layer + heads) / mean

    best = min((_with_last(total, pipeline, last) for last in range(1, total - pipeline + 2)), key=slowest)
    even = (total // pipeline,) * pipeline if total % pipeline == 0 else best
    return LayerSplit(layers=best, slowest=slowest(best), even_slowest=slowest(even))


def _with_last(total: int, pipeline: int, last: int) -> tuple[int, ...]:
    if pipeline == 1:
        return (total,)
    each, more = divmod(total - last, pipeline - 1)
    return (*(each + (stage < more) for stage in range(pipeline - 1)), last)
