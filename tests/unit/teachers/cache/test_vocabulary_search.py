"""Statistics of blocks of logits, and what is found through them, against the softmax of all logits."""

import numpy as np
import pytest
import torch

from megatron_kd.losses.tile_buffers import Workspace
from megatron_kd.teachers.cache import vocabulary_search
from megatron_kd.teachers.cache.vocabulary_search import (
    BLOCK,
    NO_LOGIT,
    BlockedSoftmax,
    blocks_of,
    sample,
    take_blocks,
    top_k,
    uniform_numbers,
)

ROWS, COLUMNS = 11, 4 * BLOCK + 9


@pytest.fixture
def padded():
    """[ROWS, B * BLOCK] logits around -500, 0 and 500, and their fp64 probabilities."""
    logits = torch.full((ROWS, BLOCK * blocks_of(COLUMNS)), NO_LOGIT)
    logits[:, :COLUMNS] = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 4
    logits[1, :COLUMNS] += 500
    logits[2, :COLUMNS] -= 500
    return logits, logits.double().softmax(-1)


@pytest.mark.parametrize("tile", [1, 1 << 20])
@pytest.mark.parametrize("exponent", [1.0, 0.7])
def test_statistics(padded, tile, exponent, monkeypatch):
    logits, probabilities = padded
    monkeypatch.setattr(vocabulary_search, "CPU_TILE_ELEMENTS", tile)
    measured = BlockedSoftmax.measure(logits, Workspace(), exponent)
    in_blocks = probabilities.unflatten(1, (-1, BLOCK))
    assert torch.equal(measured.maxima, logits.unflatten(1, (-1, BLOCK)).amax(-1))
    assert torch.equal(measured.row_max, logits.amax(-1))
    close = {"rtol": 1e-5, "atol": 1e-9, "check_dtype": False}
    torch.testing.assert_close(measured.peak, probabilities.amax(-1), **close)
    torch.testing.assert_close(measured.mass, in_blocks.sum(-1), **close)
    torch.testing.assert_close(measured.proposal_mass, in_blocks.pow(exponent).sum(-1), **close)
    wanted = torch.tensor([[4, 0, 4]]).expand(ROWS, 3)
    torch.testing.assert_close(measured.probabilities(wanted), take_blocks(in_blocks, wanted), **close)
    torch.testing.assert_close(measured.proposal(wanted), take_blocks(in_blocks, wanted).pow(exponent), **close)


def test_some_rows_are_those_rows(padded):
    logits, _ = padded
    measured = BlockedSoftmax.measure(logits, Workspace())
    some, wanted = measured.rows(slice(3, 6)), torch.tensor([[0], [2], [4]])
    assert torch.equal(some.probabilities(wanted)[1, 0], measured.probabilities(torch.full((ROWS, 1), 2))[4, 0])


def test_blocks_of_padding_alone_are_finite_and_no_rows_are_no_rows():
    nothing = BlockedSoftmax.measure(torch.full((2, BLOCK), NO_LOGIT), Workspace())
    assert bool(torch.isfinite(nothing.peak).all()) and nothing.row_max.tolist() == pytest.approx([NO_LOGIT] * 2)
    assert BlockedSoftmax.measure(torch.empty(0, 2 * BLOCK), Workspace()).mass.shape == (0, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows(padded, wrong):
    logits, _ = padded
    logits[4, 77] = wrong
    finite = torch.isfinite(BlockedSoftmax.measure(logits, Workspace()).peak)
    assert finite.tolist() == [row != 4 for row in range(ROWS)]


@pytest.mark.parametrize("columns", [5, 128, 300, 5_000, 5_001, 16_384, 20_011])
@pytest.mark.parametrize("count", [1, 5, 16, 100])
def test_top_k_is_that_of_a_full_sort(columns, count):
    if count > columns:
        return
    values = torch.rand(7, columns, generator=torch.Generator().manual_seed(columns))
    values[0, -1] = 2.0
    values[1, 128:140] = 3.0
    expected = values.sort(-1, descending=True)
    blocks = torch.full((7, blocks_of(columns) * BLOCK), NO_LOGIT)
    blocks[:, :columns] = values
    blocks = blocks.unflatten(1, (-1, BLOCK))
    found, ids = top_k(blocks, blocks.amax(-1), count)
    assert torch.equal(found, expected.values[:, :count])
    assert torch.equal(values.gather(-1, ids), found)
    assert all(len(set(row)) == count for row in ids.tolist())


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
    return sample(blocks.sum(-1), lambda wanted: take_blocks(blocks, wanted), numbers, 0, None)


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
