"""What is refused before anything is built."""

import pytest
import torch

from megatron_kd.errors import LayoutError
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.training.training_run import plan_layout
from tests.reference.one_rank import train_config


@pytest.mark.parametrize(
    ("world_size", "parallel", "batch", "message"),
    [
        (3, {"tensor_model_parallel_size": 3}, 4, "^attention heads 4 do not divide by tensor_model_parallel_size 3; "),
        (3, {"pipeline_model_parallel_size": 3}, 4, "^layers 4 do not divide by pipeline_model_parallel_size .*3$"),
        (2, {}, 12, "global_batch_size 12 does not divide by training.micro_batch_size 4 x data-parallel size 2 = 8"),
        (3, {"tensor_model_parallel_size": 2}, 4, "^3 ranks do not divide into .* = 2 x 1 x 1 = 2: start a multiple"),
    ],
    ids=["heads by TP3", "layers by PP3", "batch by DP2", "ranks by TP2"],
)
def test_a_layout_that_does_not_divide(dataset, world_size, parallel, batch, message):
    config = train_config(
        dataset,
        model={"name": "qwen_toy_student"},
        parallel=parallel,
        training={"global_batch_size": batch, "micro_batch_size": 4},
    )
    architecture = architecture_by_name("qwen_toy_student").with_vocab_size(dataset.vocab_size)
    runtime = Runtime(device=torch.device("cpu"), rank=0, world_size=world_size)
    with pytest.raises(LayoutError, match=message):
        plan_layout(config, architecture, dataset.seq_length, runtime)
