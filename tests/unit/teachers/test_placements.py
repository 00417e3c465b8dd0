"""A teacher's own layout, and which teacher is asked about held-out text."""

from types import SimpleNamespace

import pytest

from megatron_kd.errors import LayoutError
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.teachers import placements
from megatron_kd.teachers.placements import StudentRun, build_heldout_teacher, plan_teacher
from megatron_kd.teachers.teacher_config import TeacherConfig

INFO = SimpleNamespace(path="p", architecture=architecture_by_name("qwen_toy_reference").with_vocab_size(300))
STUDENT = ParallelLayout(tensor=2, pipeline=2, context=1, data=1, sequence_parallel=True)


def run_of(teachers=None):
    split = None if teachers is None else SimpleNamespace(num_teachers=teachers)
    architecture = architecture_by_name("qwen_toy_student").with_vocab_size(300)
    return StudentRun("data", architecture, STUDENT, 32, "fp32", "auto", 1.0, "auto", 10, "cpu", split)


def layout_of(monkeypatch, config, teachers=None):
    monkeypatch.setattr(placements, "open_checkpoint", lambda path: INFO)
    monkeypatch.setattr(placements, "check_same_tokenizer", lambda info, data: None)
    return plan_teacher(config, run_of(teachers)).layout


@pytest.mark.parametrize(
    ("keys", "teachers", "expected"),
    [
        ({}, None, (2, 2, 1, True)),
        ({"tensor_model_parallel_size": 1}, None, (1, 2, 2, False)),
        ({"pipeline_model_parallel_size": 1, "sequence_parallel": False}, None, (2, 1, 2, False)),
        ({}, 4, (1, 1, 4, False)),
        ({"tensor_model_parallel_size": 2}, 2, (2, 1, 1, True)),
    ],
)
def test_a_teachers_layout_is_the_students_or_its_own_filled_up_with_replicas(keys, teachers, expected, monkeypatch):
    layout = layout_of(monkeypatch, TeacherConfig("colocated", "p", **keys), teachers)
    assert (layout.tensor, layout.pipeline, layout.data, layout.sequence_parallel) == expected
    assert layout.context == 1


def test_a_layout_that_does_not_fit_is_refused_with_its_keys(monkeypatch):
    with pytest.raises(LayoutError, match="4 ranks do not divide into teacher.tensor_model_parallel_size"):
        layout_of(monkeypatch, TeacherConfig("colocated", "p", tensor_model_parallel_size=3))
    with pytest.raises(LayoutError, match="the teacher p under TP1 PP4 .*layers 2 do not divide"):
        layout_of(
            monkeypatch,
            TeacherConfig("colocated", "p", tensor_model_parallel_size=1, pipeline_model_parallel_size=4),
        )


def test_held_out_text_is_asked_of_the_teacher_or_of_a_cache_of_its_own(monkeypatch):
    built = []
    monkeypatch.setattr(placements, "build_teacher", lambda config, run, groups: built.append((config, run)) or "other")
    run, running, cached = run_of(), TeacherConfig("colocated", "p"), TeacherConfig("cached", cache_path="c")
    assert build_heldout_teacher(running, run, "groups", "teacher", "heldout") == "teacher"
    assert build_heldout_teacher(running, run, "groups", "teacher", None) is None
    assert build_heldout_teacher(running, run, "groups", None, "heldout") is None
    silent = TeacherConfig("colocated", "p", evaluate=False)
    assert build_heldout_teacher(silent, run, "groups", "teacher", "heldout") is None
    assert build_heldout_teacher(cached, run, "groups", "teacher", "heldout") is None
    both = TeacherConfig("cached", cache_path="c", eval_cache_path="e")
    assert not built and build_heldout_teacher(both, run, "groups", "teacher", "heldout") == "other"
    ((config, asked),) = built
    assert config.cache_path == "e" and asked.data == "heldout" and asked.layout == STUDENT
