"""Bubble and layer split against closed forms, and against every split that the keys of a layout can ask for."""

import itertools

import pytest

from megatron_kd.errors import LayoutError
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.planning.pipeline_costs import (
    balanced_split,
    bubble_fraction,
    expressible_splits,
    layer_flops,
    layer_split,
    student_head_flops,
    teacher_head_flops,
)

TEACHER = architecture_by_name("qwen_1.8b")


def test_bubble_of_a_pipeline():
    assert bubble_fraction(1, 8) == 0
    assert bubble_fraction(4, 12) == pytest.approx(3 / 15)
    assert bubble_fraction(4, 12, virtual=2) == pytest.approx(3 / 27)


@pytest.mark.parametrize(("name", "share"), [("qwen_200m", 0.51), ("qwen_500m", 0.22), ("qwen_1.2b", 0.11)])
def test_the_teachers_head_on_top_of_a_student(name, share):
    student = architecture_by_name(name)
    assert teacher_head_flops(TEACHER) == pytest.approx(0.62e9, rel=0.01)
    parameters = student.parameters if student.tie_word_embeddings else student.parameters - 151_936 * 1536
    assert teacher_head_flops(TEACHER) / (6 * parameters) == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("teacher", [None, TEACHER])
def test_no_other_split_is_faster(stages, teacher):
    student = architecture_by_name("qwen_1.2b")
    split = balanced_split(student, teacher, stages)
    assert sum(split.layers) == 24 and len(split.layers) == stages
    assert split.slowest <= layer_split(student, teacher, [24 // stages] * stages).slowest
    heads = student_head_flops(student) + (teacher_head_flops(teacher) if teacher else 0)
    mean = (24 * layer_flops(student) + heads) / stages

    def slowest(layers):
        return max([*(n * layer_flops(student) for n in layers[:-1]), layers[-1] * layer_flops(student) + heads]) / mean

    assert split.slowest == pytest.approx(min(map(slowest, every_split_of_a_layout(24, stages))))
    assert split.slowest == pytest.approx(slowest(split.layers))


def every_split_of_a_layout(layers, stages, virtual=1):
    """By asking the layout itself what it takes."""
    for first, last in itertools.product(range(1, layers), repeat=2):
        layout = ParallelLayout.for_world(
            ParallelConfig(
                pipeline_model_parallel_size=stages,
                virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
                num_layers_in_first_pipeline_stage=first,
                num_layers_in_last_pipeline_stage=last,
            ),
            stages,
        )
        try:
            layout.check_model(
                num_layers=layers, num_attention_heads=1, num_query_groups=1, ffn_hidden_size=1, seq_length=1
            )
        except LayoutError:
            continue
        yield tuple(layout.stage_layers(layers))


@pytest.mark.parametrize(("layers", "stages", "virtual"), [(24, 2, 1), (24, 4, 1), (24, 3, 2), (18, 4, 1), (12, 2, 2)])
def test_every_split_can_be_asked_for(layers, stages, virtual):
    found = set(expressible_splits(layers, stages, virtual))
    assert found == set(every_split_of_a_layout(layers, stages, virtual))


def test_the_keys_of_a_split():
    student = architecture_by_name("qwen_1.2b")
    assert layer_split(student, None, (6, 6, 6, 6)).keys == ()
    assert layer_split(student, None, (7, 8, 8, 1)).keys == (
        "parallel.num_layers_in_first_pipeline_stage=7",
        "parallel.num_layers_in_last_pipeline_stage=1",
    )


def test_a_teacher_takes_layers_from_the_last_stage():
    student = architecture_by_name("qwen_1.2b")
    assert balanced_split(student, TEACHER, 2).layers[-1] < balanced_split(student, None, 2).layers[-1] < 12
    assert balanced_split(student, None, 1).layers == (24,)
