"""The byte budget: what a chunk may hold, in which dtypes."""

import pytest
import torch

from megatron_kd.losses.tile_buffers import ChunkDtypes, ChunkPlan, bytes_per_logit

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("weights", "kernels", "by_tile", "stored", "evaluated", "size"),
    [
        ((FP32, FP32), False, True, FP32, FP32, 4 + 4),
        ((FP32,), True, True, FP32, FP32, 4),
        ((BF16, BF16), False, True, BF16, FP32, 2 + 2),
        ((BF16, BF16), False, False, FP32, FP32, 4 + 4 + 2),
        ((BF16, BF16), True, False, BF16, BF16, 2 + 2),
        ((BF16, FP32), True, True, FP32, FP32, 4 + 4 + 2),
        ((FP32, BF16), True, True, FP32, FP32, 4 + 4 + 2),
        ((BF16, FP16), True, True, FP32, FP32, 4 + 4 + 2),
        ((FP32, FP64), False, True, FP64, FP64, 8 + 8 + 4),
    ],
)
def test_dtypes_of_a_chunk_and_its_bytes_for_a_logit(weights, kernels, by_tile, stored, evaluated, size):
    dtypes = ChunkDtypes.of(weights, kernels_read_narrow=kernels, widens_by_tile=by_tile)
    assert dtypes == ChunkDtypes(stored, evaluated)
    assert bytes_per_logit(weights, stored) == size


def test_a_budget_is_spread_evenly_over_the_chunks():
    plan = ChunkPlan.of(budget=8 << 20, tokens=100, rows=1 << 14, number_bytes=4, logit_bytes=8)
    assert plan.temporary_bytes == 2 << 20
    assert plan.tokens == 34  # 48 fit, so there are three chunks
    assert plan.tile_elements * 8 * 4 == plan.temporary_bytes


def test_one_token_is_the_least_and_temporaries_have_a_limit():
    assert ChunkPlan.of(budget=1, tokens=5, rows=1 << 14, number_bytes=4, logit_bytes=8) == ChunkPlan(1, 1, 0)
    assert ChunkPlan.of(budget=1 << 40, tokens=5, rows=1, number_bytes=4, logit_bytes=8).temporary_bytes == 32 << 20
