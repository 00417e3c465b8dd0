"""Where a pipeline loses time: its bubble, and a last stage that carries the heads of student and teacher.

FLOPs are counted as in planning/flops.py: 2 a parameter and token forward, 6 forward and backward. The input embedding
is a lookup and costs a stage nothing, so balance counts layers and heads only.
"""

from dataclasses import dataclass
from typing import Iterator, Sequence

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
    """

    layers: tuple[int, ...]
    slowest: float

    @property
    def keys(self) -> tuple[str, ...]:
        """Settings that ask for it; none where every stage has as many."""
        if len(set(self.layers)) == 1:
            return ()
        return (f"parallel.num_layers_in_first_pipeline_stage={self.layers[0]}",
                f"parallel.num_layers_in_last_pipeline_stage={self.layers[-1]}")


def layer_split(
    student: ModelArchitecture, dense_teacher: ModelArchitecture | None, layers: Sequence[int]
) -> LayerSplit:
    """This split and its balance; ``dense_teacher`` is one whose head the student's last stage computes, or None."""
    heads = student_head_flops(student) + (teacher_head_flops(dense_teacher) if dense_teacher else 0)
    stages = [count * layer_flops(student) for count in layers]
    stages[-1] += heads
    return LayerSplit(tuple(layers), max(stages) / (sum(stages) / len(stages)))


def balanced_split(
    student: ModelArchitecture, dense_teacher: ModelArchitecture | None, pipeline: int, virtual: int | None = None
) -> LayerSplit:
    """Of the splits that the ``parallel.*`` keys can ask for, the one whose slowest stage is fastest.

    First and last stage have any number of layers, those between them the same; under interleaving each number divides
    by the virtual stages.
    """
    splits = (layer_split(student, dense_teacher, layers)
              for layers in expressible_splits(student.num_layers, pipeline, virtual or 1))
    return min(splits, key=lambda split: (split.slowest, max(split.layers)))


def expressible_splits(total: int, pipeline: int, virtual: int = 1) -> Iterator[tuple[int, ...]]:
    """Every split of ``total`` layers as :func:`balanced_split` says."""
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
