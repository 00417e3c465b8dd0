"""Bubble and layer split against closed forms, and against every split tried."""

import itertools

import pytest

from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.planning.pipeline import (
    balanced_split,
    bubble_fraction,
    layer_flops,
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
    assert sum(split.layers) == 24 and len(split.layers) == stages and split.slowest <= split.even_slowest
    heads = student_head_flops(student) + (teacher_head_flops(teacher) if teacher else 0)
    mean = (24 * layer_flops(student) + heads) / stages

    def slowest(layers):
        return max([*(n * layer_flops(student) for n in layers[:-1]), layers[-1] * layer_flops(student) + heads]) / mean

    every = (layers for layers in itertools.product(range(1, 24), repeat=stages) if sum(layers) == 24)
    assert split.slowest == pytest.approx(min(map(slowest, every)))
    assert split.slowest == pytest.approx(slowest(split.layers))


def test_a_teacher_takes_layers_from_the_last_stage():
    student = architecture_by_name("qwen_1.2b")
    assert balanced_split(student, TEACHER, 2).layers[-1] < balanced_split(student, None, 2).layers[-1] < 12
    assert balanced_split(student, None, 1).layers == (24,)
