"""Bubble, layer split and traffic against closed forms, counts by hand, and every split that a layout can express."""

import itertools

import pytest

from megatron_kd.costs.memory import PlacedTeacher, rank_parameters, teacher_layout
from megatron_kd.errors import LayoutError
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.planning.overheads import (
    balanced_split,
    bubble_fraction,
    expressible_splits,
    layer_flops,
    layer_split,
    step_traffic,
    student_head_flops,
    teacher_head_flops,
)

TEACHER = architecture_by_name("qwen_1.8b")
STUDENT = architecture_by_name("qwen_500m")
SIZES = {"precision": "bf16", "micro_batch_size": 4, "seq_length": 1024, "micro_batches": 2}
POSITIONS = 4 * 1024 * 2


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
    """Every split that the layout itself accepts."""
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
            layout.check_model(ModelArchitecture(layers, 1, 1, 1, 1), 1)
        except LayoutError:
            continue
        yield tuple(layout.stage_layers(layers))


@pytest.mark.parametrize(("layers", "stages", "virtual"), [(24, 2, 1), (24, 4, 1), (24, 3, 2), (18, 4, 1), (12, 2, 2)])
def test_every_split_can_be_expressed(layers, stages, virtual):
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


def traffic(world, teacher=None, remote=False, own=None, ids=None, **keys):
    layout = ParallelLayout.for_world(ParallelConfig(**keys), world)
    own = own or layout
    placed = None if teacher is None else PlacedTeacher(teacher, own, is_remote=remote, payload_ids=ids)
    return layout, step_traffic(STUDENT, layout, placed, **SIZES)


def test_one_rank_sends_nothing():
    _, sent = traffic(1)
    assert (sent.tensor, sent.pipeline, sent.data, sent.context, sent.hand_off) == (0, 0, 0, 0, 0)


def test_data_parallel_reduces_fp32_gradients_and_gathers_weights():
    layout, sent = traffic(8)
    assert sent.data == pytest.approx(7 / 8 * rank_parameters(STUDENT, layout, 0) * 6) and sent.tensor == 0


@pytest.mark.parametrize(("pipeline", "reductions"), [(1, 4 * 24 + 2), (2, 4 * 12 + 1), (4, 4 * 6 + 1)])
def test_tensor_parallel_reduces_four_times_per_layer_and_at_both_ends(pipeline, reductions):
    _, sent = traffic(2 * pipeline, tensor_model_parallel_size=2, pipeline_model_parallel_size=pipeline)
    hidden = POSITIONS * 1024 * 2
    assert sent.tensor == pytest.approx(2 * 0.5 * reductions * hidden + 2 * 0.5 * 6 * 4 * POSITIONS)


def test_a_teacher_adds_its_forward_pass_or_its_hidden_states():
    _, alone = traffic(2, tensor_model_parallel_size=2)
    _, colocated = traffic(2, teacher=TEACHER, tensor_model_parallel_size=2)
    _, remote = traffic(2, teacher=TEACHER, remote=True, tensor_model_parallel_size=2)
    assert colocated.tensor - alone.tensor == pytest.approx(2 * 0.5 * 2 * 24 * POSITIONS * 2048 * 2)
    assert remote.tensor == alone.tensor and remote.hand_off == POSITIONS * 2048 * 2
    assert colocated.hand_off == 0
    _, sparse = traffic(2, teacher=TEACHER, remote=True, ids=64, tensor_model_parallel_size=2)
    assert sparse.hand_off == POSITIONS * (8 * 64 + 4)


def test_a_teacher_in_a_layout_of_its_own():
    """TP2 student on two ranks, PP2 teacher on the same: each stage sees every position, TP1 reduces nothing."""
    layout, alone = traffic(2, tensor_model_parallel_size=2)
    _, sent = traffic(2, teacher=TEACHER, own=teacher_layout(layout, 1, 2), tensor_model_parallel_size=2)
    assert sent.tensor == alone.tensor and sent.hand_off == POSITIONS * 2048 * 2
    assert sent.pipeline == POSITIONS * 2048 * 2


def test_a_pipeline_sends_a_hidden_state_each_way_and_reduces_a_tied_embedding():
    """The ends of a pipeline have one neighbour, and hold the embedding of a tied model twice."""
    hidden, embedding = POSITIONS * 1024 * 2, 151_936 * 1024 * 4
    for stages, virtual, messages in ((2, None, 1), (4, None, 1), (2, 3, 5)):
        _, sent = traffic(stages, pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=virtual)
        assert sent.pipeline == messages * hidden + embedding
    _, split = traffic(4, pipeline_model_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
    assert split.pipeline == (hidden + 152_064 * 1024 * 4) / 2, "rows are padded to a multiple of 128 per rank"


def test_a_pipeline_of_an_untied_model_reduces_nothing():
    untied = architecture_by_name("qwen_1.2b")
    for stages, messages in ((1, 0), (2, 1), (4, 2)):
        layout = ParallelLayout.for_world(ParallelConfig(pipeline_model_parallel_size=stages), stages)
        assert step_traffic(untied, layout, None, **SIZES).pipeline == messages * POSITIONS * 1536 * 2
