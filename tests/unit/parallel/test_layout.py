"""Rank arithmetic and divisibility, checked against hand-written tables and by exhaustion."""

import itertools
from types import SimpleNamespace

import pytest

from megatron_kd.config import from_mapping, load_config
from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.evaluation.evaluate_config import EvaluateConfig
from megatron_kd.generation.generation_config import GenerateCorpusConfig
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout, as_mapping
from megatron_kd.training.train_config import TrainConfig

SIZES = {"num_layers": 4, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 96, "seq_length": 32}


def layout(world, tensor=1, pipeline=1, context=1, **other):
    return ParallelLayout.for_world(
        ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            **other,
        ),
        world,
    )


def test_groups_of_eight_ranks_are_megatrons():
    """TP2 PP2 DP2 as Megatron-Core's documentation of initialize_model_parallel numbers them."""
    eight = layout(8, tensor=2, pipeline=2)
    assert eight.data == 2 and eight.world_size == 8
    assert eight.rank_groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert eight.rank_groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert eight.rank_groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert eight.rank_groups("tensor", "pipeline") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert eight.rank_groups("tensor", "context", "data", "pipeline") == [list(range(8))]
    assert eight.rank_groups() == [[rank] for rank in range(8)]


def check_model(layout, *, seq_length, **sizes):
    layout.check_model(SimpleNamespace(**sizes), seq_length)


@pytest.mark.parametrize(("tensor", "pipeline", "context", "data"), itertools.product((1, 2, 3), repeat=4))
def test_every_group_is_a_partition_of_the_right_size(tensor, pipeline, context, data):
    whole = layout(tensor * pipeline * context * data, tensor, pipeline, context)
    sizes = {"tensor": tensor, "pipeline": pipeline, "context": context, "data": data}
    assert len({whole.coordinates(rank) for rank in range(whole.world_size)}) == whole.world_size
    for name, size in sizes.items():
        groups = whole.rank_groups(name)
        assert all(len(group) == size for group in groups)
        assert sorted(itertools.chain(*groups)) == list(range(whole.world_size))
        for group in groups:
            assert [getattr(whole.coordinates(rank), name) for rank in group] == list(range(size))


def test_a_world_that_does_not_divide_is_refused_with_all_numbers():
    with pytest.raises(LayoutError, match=r"6 ranks .* 2 x 2 x 1 = 4: start a multiple of 4"):
        layout(6, tensor=2, pipeline=2)


@pytest.mark.parametrize(
    ("parallel", "change", "message"),
    [
        ({"tensor": 2}, {"num_attention_heads": 3}, "attention heads 3 do not divide by tensor_model_parallel_size 2"),
        ({"tensor": 4}, {"num_query_groups": 2}, r"query groups \(key-value heads\) 2 do not divide"),
        ({"tensor": 2}, {"ffn_hidden_size": 95}, "feed-forward width 95"),
        ({"pipeline": 3}, {}, r"layers 4 do not divide by pipeline_model_parallel_size .* 3"),
        ({"pipeline": 2, "virtual_pipeline_model_parallel_size": 4}, {}, "layers 4 .* 8"),
        ({"tensor": 2, "sequence_parallel": True}, {"seq_length": 31}, "sequence length 31"),
        (
            {"tensor": 2, "sequence_parallel": True, "context": 2},
            {"seq_length": 34},
            r"sequence length 34 do not divide by .* x context_parallel_size 4",
        ),
        ({"context": 2}, {"seq_length": 30}, "sequence length 30 do not divide by 2 x context_parallel_size 4"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(parallel, change, message):
    world = parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1)
    whole = layout(world, **parallel)
    with pytest.raises(LayoutError, match=message):
        check_model(whole, **{**SIZES, **change})
    if change:
        check_model(whole, **SIZES)


def test_all_faults_of_a_model_are_named_at_once():
    with pytest.raises(LayoutError) as caught:
        check_model(layout(6, tensor=3, pipeline=2), **{**SIZES, "num_layers": 5})
    assert str(caught.value).count("do not divide") == 3  # heads, query groups, layers; 96 divides by 3


def test_micro_batches():
    assert layout(2).micro_batches(16, 2) == 4
    assert layout(2, pipeline=2, virtual_pipeline_model_parallel_size=2).micro_batches(8, 2) == 4
    with pytest.raises(
        LayoutError, match=r"12 does not divide by training.micro_batch_size 4 x data-parallel size 2 = 8"
    ):
        layout(2).micro_batches(12, 4)
    with pytest.raises(LayoutError, match="3 micro-batches do not divide by pipeline_model_parallel_size 2"):
        layout(2, pipeline=2, virtual_pipeline_model_parallel_size=2).micro_batches(6, 2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tensor_model_parallel_size": 0}, "must be at least 1"),
        ({"virtual_pipeline_model_parallel_size": 2}, "pipeline of at least 2"),
        ({"virtual_pipeline_model_parallel_size": 1, "pipeline_model_parallel_size": 2}, "must be at least 2"),
        ({"sequence_parallel": True}, "needs 'parallel.tensor_model_parallel_size' above 1"),
        ({"overlap_param_gather": True}, "needs 'parallel.overlap_grad_reduce'"),
    ],
)
def test_settings_that_exclude_each_other(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(ParallelConfig, keys, "test")


def test_descriptions_and_manifests():
    whole = layout(8, tensor=2, pipeline=2, sequence_parallel=True, virtual_pipeline_model_parallel_size=2)
    assert whole.describe() == "TP2 PP2 VPP2 SP DP2"
    assert ParallelLayout(**as_mapping(whole)) == whole


@pytest.mark.parametrize(
    ("first", "last", "layers"), [(None, 4, [7, 7, 6, 4]), (5, 3, [5, 8, 8, 3]), (6, None, [6, 6, 6, 6])]
)
def test_uneven_pipelines(first, last, layers):
    layout = ParallelLayout(1, 4, 1, 1, first_stage_layers=first, last_stage_layers=last)
    shape = {"num_attention_heads": 4, "num_query_groups": 4, "ffn_hidden_size": 8, "seq_length": 8}
    if (24 - (first or 0) - (last or 0)) % (2 if first and last else 3):
        with pytest.raises(LayoutError, match="layers between the given ends"):
            check_model(layout, num_layers=24, **shape)
        return
    check_model(layout, num_layers=24, **shape)
    assert layout.stage_layers(24) == layers and sum(layers) == 24


def test_ends_that_leave_nothing_are_refused():
    shape = {"num_attention_heads": 4, "num_query_groups": 4, "ffn_hidden_size": 8, "seq_length": 8}
    layout = ParallelLayout(1, 2, 1, 1, first_stage_layers=4, last_stage_layers=3)
    with pytest.raises(LayoutError, match="ends take 7 of 8 layers, 1 are left for 0 stages"):
        check_model(layout, num_layers=8, **shape)


@pytest.mark.parametrize(
    ("schema", "keys"),
    [
        (
            TrainConfig,
            [
                "data.path=a",
                "output=b",
                "model.name=qwen_toy_student",
                "distillation.method=gkd",
                "teacher.placement=colocated",
                "teacher.path=c",
            ],
        ),
        (EvaluateConfig, ["data.path=a", "model.path=b", "teacher=c"]),
        (GenerateCorpusConfig, ["prompt=begin", "num_texts=1", "data.path=a", "model.path=b", "output=c"]),
    ],
)
def test_verbs_refuse_context_parallelism_by_name(schema, keys):
    with pytest.raises(ConfigError, match="'parallel.context_parallel_size' must be 1: "):
        load_config(schema, None, [*keys, "parallel.context_parallel_size=2"])
