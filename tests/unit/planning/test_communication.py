"""Bytes a rank sends, against counts by hand."""

import pytest

from megatron_kd.costs.memory import PlacedTeacher, rank_parameters, teacher_layout
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.planning.pipeline_costs import step_traffic

STUDENT, TEACHER = architecture_by_name("qwen_500m"), architecture_by_name("qwen_1.8b")
SIZES = {"precision": "bf16", "micro_batch_size": 4, "seq_length": 1024, "micro_batches": 2}
POSITIONS = 4 * 1024 * 2


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
def test_tensor_parallel_reduces_four_times_a_layer_and_at_both_ends(pipeline, reductions):
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
    assert split.pipeline == (hidden + 152_064 * 1024 * 4) / 2, "rows are padded to a multiple of 128 a rank"


def test_a_pipeline_of_an_untied_model_reduces_nothing():
    untied = architecture_by_name("qwen_1.2b")
    for stages, messages in ((1, 0), (2, 1), (4, 2)):
        layout = ParallelLayout.for_world(ParallelConfig(pipeline_model_parallel_size=stages), stages)
        assert step_traffic(untied, layout, None, **SIZES).pipeline == messages * POSITIONS * 1536 * 2
