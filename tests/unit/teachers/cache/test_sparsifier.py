"""What is kept of a teacher's distribution, against the distribution itself."""

import numpy as np
import pytest
import torch

from megatron_kd.errors import DataError
from megatron_kd.losses import OutputHead
from megatron_kd.teachers.cache import sparsifier, vocabulary_search
from megatron_kd.teachers.cache.codecs import SampledCodec, TopKCodec, TopPCodec
from megatron_kd.teachers.cache.sparsifier import Sparsifier

VOCABULARY, TOKENS = 700, 37


@pytest.fixture
def teacher():
    """A head with padded rows, hidden states, and the probabilities [T, V] at a temperature."""
    generator = torch.Generator().manual_seed(3)
    head = OutputHead(torch.randn(720, 16, generator=generator), valid_vocab_size=VOCABULARY)
    hidden = torch.randn(TOKENS, 16, generator=generator)

    def probabilities(temperature=1.0):
        return (hidden.double() @ head.weight[:VOCABULARY].double().t() / temperature).softmax(-1).numpy()

    return head, hidden, probabilities


def select(codec, head, hidden, **options):
    chunk_ids, positions = np.arange(len(hidden)) // 10, np.arange(len(hidden)) % 10
    return Sparsifier(codec, head, None, **options)(hidden, chunk_ids, positions)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tile_bytes", [1, 4 * VOCABULARY * 5, 1 << 20])
def test_top_k(teacher, temperature, tile_bytes):
    head, hidden, probabilities = teacher
    p = probabilities(temperature)
    entries = select(TopKCodec(12, VOCABULARY), head, hidden, temperature=temperature, tile_bytes=tile_bytes)
    order = np.argsort(-p, axis=1)[:, :12]
    assert np.array_equal(entries.ids.reshape(TOKENS, 12), order)
    found, expected = entries.columns["probabilities"].reshape(TOKENS, 12), np.take_along_axis(p, order, 1)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(entries.tail, 1 - np.take_along_axis(p, order, 1).sum(1), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("codec", [TopKCodec(12, VOCABULARY), SampledCodec(20, VOCABULARY)])
def test_tiles_change_nothing(teacher, codec, monkeypatch):
    """13 tokens at a time, read in tiles of 5 and searched 4 at a time, against all at once."""
    head, hidden, _ = teacher
    whole = select(codec, head, hidden)
    padded = vocabulary_search.BLOCK * vocabulary_search.blocks_of(VOCABULARY)
    monkeypatch.setattr(vocabulary_search, "CPU_TILE_ELEMENTS", 5 * padded)
    monkeypatch.setattr(sparsifier, "CPU_TOKENS_AT_ONCE", 4)
    tiled = select(codec, head, hidden, tile_bytes=4 * padded * 13)
    assert np.array_equal(tiled.counts, whole.counts) and np.array_equal(tiled.ids, whole.ids)
    assert tiled.columns.keys() == whole.columns.keys()
    for name, values in [("tail", whole.tail), *whole.columns.items()]:
        found = tiled.tail if name == "tail" else tiled.columns[name]
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-8, err_msg=name)


def test_top_p_keeps_the_fewest_ids(teacher):
    head, hidden, probabilities = teacher
    p = np.sort(probabilities(), axis=1)[:, ::-1]
    entries = select(TopPCodec(30, VOCABULARY, top_p=0.9), head, hidden)
    held = np.cumsum(p, axis=1)
    expected = np.minimum((held < 0.9).sum(1) + 1, 30)
    assert np.array_equal(entries.counts, expected) and len(set(expected)) > 3 and expected.max() == 30
    np.testing.assert_allclose(entries.tail, 1 - held[np.arange(TOKENS), expected - 1], rtol=1e-3, atol=1e-7)


def test_a_vocabulary_smaller_than_k(teacher):
    head, hidden, _ = teacher
    small = OutputHead(head.weight, valid_vocab_size=5)
    entries = select(TopKCodec(12, 5), small, hidden)
    assert (entries.counts == 5).all() and (entries.tail == 0).all()
    np.testing.assert_allclose(entries.columns["probabilities"].reshape(-1, 5).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("exponent", [1.0, 0.8])
def test_draws_estimate_the_distribution(teacher, exponent):
    """One token, drawn many times at different places: the mean of the weights is the distribution."""
    head, hidden, probabilities = teacher
    p, times = probabilities()[0], 4000
    codec = SampledCodec(20, VOCABULARY, proposal_exponent=exponent)
    entries = select(codec, head, hidden[:1].expand(times, -1))
    weights = entries.columns["draws"] / 20 * entries.columns.get("importance", 1.0)
    mean = np.bincount(entries.ids, weights, minlength=VOCABULARY) / times
    error = np.sqrt(p.max() / 20 / times)
    assert np.abs(mean - p).max() < 6 * error
    assert ("importance" in entries.columns) == (exponent != 1.0)
    first = np.cumsum(entries.counts) - entries.counts
    assert np.add.reduceat(entries.columns["draws"].astype(int), first).tolist() == [20] * times


def test_tail_of_draws_is_what_was_not_drawn(teacher):
    head, hidden, probabilities = teacher
    p = probabilities()
    entries = select(SampledCodec(9, VOCABULARY), head, hidden)
    owner = np.repeat(np.arange(TOKENS), entries.counts)
    assert all(len(set(entries.ids[owner == row])) == entries.counts[row] for row in range(TOKENS))
    held = np.bincount(owner, p[owner, entries.ids], minlength=TOKENS)
    np.testing.assert_allclose(entries.tail, 1 - held, rtol=1e-3, atol=1e-6)


def test_draws_do_not_depend_on_the_batch(teacher):
    head, hidden, _ = teacher
    codec = SampledCodec(9, VOCABULARY)
    chunk_ids, positions = np.arange(TOKENS) // 10, np.arange(TOKENS) % 10
    whole = Sparsifier(codec, head, None)(hidden, chunk_ids, positions)
    order = np.arange(TOKENS)[::-1].copy()
    turned = Sparsifier(codec, head, None)(hidden[order], chunk_ids[order], positions[order])
    first, last = whole.ids[: whole.counts[0]], turned.ids[-turned.counts[-1] :]
    assert np.array_equal(first, last) and not np.array_equal(whole.ids, turned.ids)


def test_no_tokens(teacher):
    head, hidden, _ = teacher
    for codec in (TopKCodec(4, VOCABULARY), SampledCodec(4, VOCABULARY, proposal_exponent=0.9)):
        entries = select(codec, head, hidden[:0])
        assert len(entries.counts) == len(entries.ids) == len(entries.tail) == 0


def test_a_teacher_that_is_not_finite_is_refused(teacher):
    head, hidden, _ = teacher
    hidden[3] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        select(TopKCodec(4, VOCABULARY), head, hidden)
