"""Draws follow the distribution, and depend on seed, chunk and position alone."""

import numpy as np
import pytest
import torch

from megatron_kd.teachers.cache.vocabulary_search import BLOCK, blocks_of, draw, take_blocks, uniform_numbers


def uniforms(rows, draws, seed=0):
    return torch.from_numpy(uniform_numbers(seed, np.zeros(rows, np.int64), np.arange(rows), draws))


def test_numbers_depend_on_seed_chunk_and_position_and_fill_the_interval():
    chunks, positions = np.array([3, 3, 4, 3]), np.array([0, 1, 0, 0])
    numbers = uniform_numbers(1, chunks, positions, 1000)
    assert np.array_equal(numbers[0], numbers[3])
    assert not np.array_equal(numbers[0], uniform_numbers(2, chunks, positions, 1000)[0])
    assert len({row.tobytes() for row in numbers}) == 3
    assert 0 <= numbers.min() and numbers.max() < 1
    assert np.abs(np.histogram(numbers[:3], 10, (0, 1))[0] - 300).max() < 75
    assert abs(np.corrcoef(numbers[0], numbers[1])[0, 1]) < 0.1 and abs(np.corrcoef(numbers[0], numbers[2])[0, 1]) < 0.1


def draw_from(weights, numbers):
    blocks = torch.zeros(len(weights), blocks_of(weights.shape[1]) * BLOCK)
    blocks[:, : weights.shape[1]] = weights
    blocks = blocks.unflatten(1, (-1, BLOCK))
    return draw(blocks.sum(-1), lambda wanted: take_blocks(blocks, wanted), numbers, 0, None)


@pytest.mark.parametrize("columns", [3, BLOCK, BLOCK + 1, 5 * BLOCK + 17])
def test_a_draw_is_where_the_cumulative_weight_passes_it(columns):
    weights = torch.rand(6, columns, generator=torch.Generator().manual_seed(columns)) ** 8
    weights[1, : columns // 2] = 0.0
    weights[2] = 0.0
    weights[2, columns // 3] = 1.0
    numbers = uniforms(6, 400)
    ids, total = draw_from(weights, numbers)
    cumulative = weights.double().cumsum(-1) / weights.double().sum(-1, keepdim=True)
    expected = torch.searchsorted(cumulative, numbers, right=True).clamp_max(columns - 1)
    assert (ids != expected).sum() <= 3  # rounding at the edges
    assert bool((weights.gather(-1, ids) > 0).all())
    torch.testing.assert_close(total, weights.double().sum(-1), rtol=1e-5, atol=0)


def test_the_largest_number_never_draws_an_impossible_id():
    weights = torch.zeros(1, 700)
    weights[0, 10], weights[0, 300] = 1.0, 1e-30
    ids, _ = draw_from(weights, torch.tensor([[0.0, 0.5, 1 - 2**-53]], dtype=torch.float64))
    assert bool((weights.gather(-1, ids) > 0).all())


def test_counts_estimate_the_distribution_without_bias():
    weights = torch.tensor([[0.6, 0.3, 0.08, 0.02]]).expand(4000, 4)
    ids, _ = draw_from(weights, uniforms(4000, 5))
    shares = torch.bincount(ids.flatten(), minlength=4) / ids.numel()
    torch.testing.assert_close(shares, weights[0], atol=0.012, rtol=0)
