"""Records of every codec: what comes back, how exact it is, how many bytes it takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.errors import DataError
from megatron_kd.teachers.cache.codec import TAIL_CODE, Entries, ranks
from megatron_kd.teachers.cache.codecs import HEAD_CODE, REST_CODE, SampledCodec, TopKCodec, TopPCodec


def make_entries(codec, rows, seed):
    """Random entries that the codec could have chosen: uneven distributions, any count that it allows."""
    chance = np.random.default_rng(seed)
    most = min(codec.max_ids, codec.vocab_size)
    counts = np.full(rows, most) if codec.fixed_count else chance.integers(1, most + 1, rows)
    ids, probabilities, draws, tails = [], [], [], []
    for count in counts:
        logits = chance.normal(0, chance.uniform(0.1, 8), count + 1)
        p = np.sort(np.exp(logits - logits.max()))[::-1]
        p /= p.sum()
        ids.append(chance.choice(codec.vocab_size, count, replace=False))
        probabilities.append(p[:count])
        tails.append(max(0.0, 1 - p[:count].sum()))
        extra = chance.multinomial(codec.max_ids - count, np.ones(count) / count)
        draws.append(extra + 1)

    def joined(arrays, dtype):
        return np.concatenate(arrays or [np.zeros(0)]).astype(dtype)

    columns = {"probabilities": joined(probabilities, np.float32)}
    if isinstance(codec, SampledCodec):
        columns = {"draws": joined(draws, np.uint16)}
        if codec.is_weighted:
            columns["importance"] = np.exp(chance.normal(0, 3, int(counts.sum()))).astype(np.float32)
    return Entries(counts.astype(np.int64), joined(ids, np.uint32), np.array(tails, dtype=np.float32), columns)


@st.composite
def codecs(draw):
    name = draw(st.sampled_from(["top_k", "top_p", "sampled", "weighted"]))
    vocab_size = draw(st.sampled_from([70, 256, 300, 50_257, 151_936, 1 << 20]))
    max_ids = draw(st.sampled_from([1, 2, 7, 8, 9, 50, 64]))
    return codec_of(name, max_ids, vocab_size)


def codec_of(name, max_ids, vocab_size):
    if name == "top_k":
        return TopKCodec(max_ids, vocab_size)
    if name == "top_p":
        return TopPCodec(max_ids, vocab_size, top_p=0.9)
    return SampledCodec(max_ids, vocab_size, proposal_exponent=0.9 if name == "weighted" else 1.0)


@settings(deadline=None, max_examples=200)
@given(codecs(), st.integers(0, 20), st.integers(0, 2**32))
def test_round_trip(codec, positions, seed):
    chance = np.random.default_rng(seed)
    present = chance.random(positions) < chance.choice([0.5, 1.0])
    entries = make_entries(codec, int(present.sum()), seed)
    record = codec.encode(present, entries)
    decoded = codec.decode(record, positions, len(entries.ids))
    assert np.array_equal(decoded.rows, np.flatnonzero(present)) and np.array_equal(decoded.counts, entries.counts)
    assert np.array_equal(decoded.ids, entries.ids)
    above = entries.tail > 1e-9
    np.testing.assert_allclose(decoded.tail[above], entries.tail[above], rtol=0.02)
    assert np.abs(decoded.tail - entries.tail).max(initial=0) < TAIL_CODE.step + REST_CODE.step / 8
    if codec.name == "sampled":
        expected = entries.columns["draws"] / codec.max_ids * entries.columns.get("importance", 1.0)
        np.testing.assert_allclose(decoded.weights, expected, rtol=4e-4 if codec.is_weighted else 1e-6)
        return
    owner = np.repeat(np.arange(len(entries.counts)), entries.counts)
    sums = np.bincount(owner, decoded.weights, minlength=len(entries.counts)) + decoded.tail
    np.testing.assert_allclose(sums, 1.0, atol=2e-6)
    exact = 1e-9 < entries.columns["probabilities"]
    head = exact & (ranks(entries.counts) < 8)
    np.testing.assert_allclose(decoded.weights[head], entries.columns["probabilities"][head], rtol=0.01)
    assert np.abs(decoded.weights - entries.columns["probabilities"]).max(initial=0) < REST_CODE.step / 8
    assert len(entries.ids) == 0 or HEAD_CODE.step < 4e-4


@settings(deadline=None, max_examples=50)
@given(codecs(), st.integers(1, 12), st.integers(0, 2**32))
def test_padding_puts_every_id_in_its_row(codec, positions, seed):
    chance = np.random.default_rng(seed)
    present = chance.random(positions) < 0.7
    entries = make_entries(codec, int(present.sum()), seed)
    decoded = codec.decode(codec.encode(present, entries), positions, len(entries.ids))
    ids = np.full((positions + 2, codec.max_ids), -1, dtype=np.int64)
    weights, tail = np.zeros(ids.shape, np.float32), np.ones(len(ids), np.float32)
    decoded.pad_into(ids, weights, tail)
    at = 0
    for row, count in zip(np.flatnonzero(present), entries.counts, strict=True):
        assert ids[row, :count].tolist() == entries.ids[at : at + count].tolist()
        assert weights[row, :count].tolist() == decoded.weights[at : at + count].tolist()
        assert (ids[row, count:] == -1).all() and (weights[row, count:] == 0).all()
        at += count
    outside = np.setdiff1d(np.arange(len(ids)), np.flatnonzero(present))
    assert (ids[outside] == -1).all() and (tail[outside] == 1).all()


def test_sizes_at_qwens_vocabulary():
    positions = np.ones(1024, dtype=bool)
    top = TopKCodec(64, 151_936)
    size = len(top.encode(positions, make_entries(top, 1024, 0))) / 1024
    assert size == 128 / 1024 + 2 + 64 * 2.25 + 16 + 77 <= 239.5
    sampled = SampledCodec(50, 151_936)
    entries = make_entries(sampled, 1024, 0)
    assert len(sampled.encode(positions, entries)) <= 3 * len(entries.ids) + 5 * 1024


@pytest.mark.parametrize("name", ["top_k", "top_p", "sampled", "weighted"])
def test_a_record_of_another_length_is_refused(name):
    codec = codec_of(name, 10, 1000)
    entries = make_entries(codec, 16, 3)
    record = codec.encode(np.ones(16, dtype=bool), entries)
    for wrong in (record[:-1], np.append(record, np.uint8(0))):
        with pytest.raises(DataError, match="record"):
            codec.decode(wrong, 16, len(entries.ids))
    with pytest.raises(DataError, match="ids where its index states"):
        codec.decode(record, 16, len(entries.ids) - 1)
