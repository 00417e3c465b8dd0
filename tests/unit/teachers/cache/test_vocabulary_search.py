"""Statistics of blocks of logits against the softmax of all of them."""

import pytest
import torch

from megatron_kd.losses.tile_buffers import Workspace
from megatron_kd.teachers.cache import vocabulary_search as blocks
from megatron_kd.teachers.cache.vocabulary_search import BLOCK, NO_LOGIT, blocks_of, measure_blocks, take_blocks

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
    monkeypatch.setattr(blocks, "CPU_TILE_ELEMENTS", tile)
    measured = measure_blocks(logits, Workspace(), exponent)
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
    measured = measure_blocks(logits, Workspace())
    some, wanted = measured.rows(slice(3, 6)), torch.tensor([[0], [2], [4]])
    assert torch.equal(some.probabilities(wanted)[1, 0], measured.probabilities(torch.full((ROWS, 1), 2))[4, 0])


def test_blocks_of_padding_alone_are_finite_and_no_rows_are_no_rows():
    nothing = measure_blocks(torch.full((2, BLOCK), NO_LOGIT), Workspace())
    assert bool(torch.isfinite(nothing.peak).all()) and nothing.row_max.tolist() == pytest.approx([NO_LOGIT] * 2)
    assert measure_blocks(torch.empty(0, 2 * BLOCK), Workspace()).mass.shape == (0, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows(padded, wrong):
    logits, _ = padded
    logits[4, 77] = wrong
    finite = torch.isfinite(measure_blocks(logits, Workspace()).peak)
    assert finite.tolist() == [row != 4 for row in range(ROWS)]
