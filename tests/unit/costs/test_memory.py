"""The constants that the plan repeats, because it must not import what defines them, are still those."""

import pytest
import torch

from megatron_kd.costs import memory
from megatron_kd.losses.fused_linear import DEFAULT_TILE_BYTES
from megatron_kd.losses.tile_buffers import LARGEST_BLOCK, MOST_TEMPORARIES, bytes_per_logit
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.teachers import colocated


def test_constants_are_those_of_the_loss():
    assert memory.LOSS_TILE_BYTES == DEFAULT_TILE_BYTES
    assert memory.LOSS_TEMPORARY_BYTES == MOST_TEMPORARIES * LARGEST_BLOCK * 4
    for models in (1, 2):
        assert bytes_per_logit([torch.float32] * models, torch.float32) == memory.LOGIT_BYTES * models
        assert bytes_per_logit([torch.bfloat16] * models, torch.float32) == memory.LOGIT_BYTES * models + 2


def test_hidden_states_wait_as_long_as_a_wave():
    """A whole step's under the student's pipeline; else enough for every replica and stage of the teacher."""
    assert memory.PASSES_PER_STAGE == colocated.PASSES_PER_STAGE

    def waiting(student, own, micro_batches=16, stash=1 << 30):
        layouts = [
            ParallelLayout.for_world(
                ParallelConfig(**dict(zip(("tensor_model_parallel_size", "pipeline_model_parallel_size"), sizes))), 8
            )
            for sizes in (student, own)
        ]
        return memory.waiting_micro_batches(*layouts, 1 << 20, micro_batches, stash)

    assert waiting((1, 1), (1, 1)) == 1 and waiting((1, 2), (1, 2)) == 16
    assert waiting((2, 1), (1, 2)) == 4 and waiting((2, 1), (1, 1)) == 2 and waiting((1, 1), (2, 1)) == 1
    assert waiting((1, 1), (1, 4), micro_batches=3) == 2, "two replicas of the teacher serve eight of the student"
    assert waiting((8, 1), (1, 1), micro_batches=3) == 3 and waiting((1, 1), (1, 8), stash=8 << 20) == 1


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("vocab_size", [300, 151_936, 128_256])
def test_padded_rows(vocab_size, tensor):
    assert memory.padded_rows(vocab_size, tensor) == padded_vocab_size(vocab_size, tensor)


def test_in_flight_micro_batches_fall_along_a_pipeline():
    student = architecture_by_name("qwen_500m")
    layout = ParallelLayout.for_world(ParallelConfig(pipeline_model_parallel_size=4), 4)
    held = [memory.in_flight_layers(student, layout, stage, micro_batches=16) for stage in range(4)]
    assert held == [24, 18, 12, 6]
    assert memory.in_flight_layers(student, layout, 0, micro_batches=2) == 12


def test_a_long_batch_fills_the_loss_budget_and_no_more():
    student = architecture_by_name("qwen_500m")
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    sizes = [memory.loss_tile_bytes(student, layout, tokens, "bf16", 2) for tokens in (8, 1 << 14, 1 << 20)]
    assert sizes[0] == 8 * 151_936 * 10
    assert sizes[1] == sizes[2] == (896 - 32) << 20
