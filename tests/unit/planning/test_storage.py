"""Bytes on disk against a dataset and a score file that were really written, and against published sizes."""

import numpy
import pytest

from megatron_kd.data.chunk_dataset_writer import write_chunk_dataset
from megatron_kd.data.tokenizer_info import plain_tokenizer_info
from megatron_kd.planning.storage import cache_sizes, corpus_bytes, sampled_bytes, score_bytes, top_k_bytes
from megatron_kd.teachers.cache.codec import Codec, Entries


@pytest.mark.parametrize("vocab_size", [300, 151_936])
def test_a_written_dataset_has_the_planned_size(tmp_path, vocab_size):
    chunks, length = 2000, 129
    ids = numpy.random.default_rng(0).integers(0, 300, (chunks, length))
    write_chunk_dataset(tmp_path / "d", iter(ids), plain_tokenizer_info(vocab_size, 0), length - 1)
    size = sum(path.stat().st_size for path in (tmp_path / "d").glob("chunks-*") if path.suffix in (".bin", ".idx"))
    assert corpus_bytes(chunks * length, vocab_size, length - 1) == pytest.approx(size, rel=0.02)


def test_scores_are_a_float_a_sequence():
    assert score_bytes(50e9, 1024) == pytest.approx(200e6, rel=0.05)  # the paper's 200 MB for 50B tokens


def test_caches_of_the_papers_corpus():
    full, top, sampled = cache_sizes(50e9, 151_936, 1024)
    assert 2 * full.total == pytest.approx(30e15, rel=0.02)  # the paper counts 4 bytes a logit: 30 PB
    assert sampled.bytes_per_token == pytest.approx(39, rel=0.02)
    assert top.bytes_per_token == pytest.approx(239, rel=2e-3)


@pytest.mark.parametrize(("name", "size"), [("top_k", 64), ("top_k", 5), ("sampled", 50)])
def test_a_record_has_the_planned_size(name, size):
    """What the codec really writes about a chunk."""
    positions, vocabulary = 512, 151_936
    generator = numpy.random.default_rng(0)
    counts = numpy.full(positions, size) if name == "top_k" else generator.integers(1, 25, positions)
    total = int(counts.sum())
    ids = generator.integers(0, vocabulary, total).astype(numpy.uint32)
    values = (
        {"probabilities": numpy.full(total, 0.01, numpy.float32)}
        if name == "top_k"
        else {"draws": numpy.ones(total, numpy.uint16)}
    )
    entries = Entries(counts=counts, ids=ids, tail=numpy.full(positions, 0.1, numpy.float32), **values)
    record = Codec(name, size, vocabulary).encode(numpy.ones(positions, bool), entries)
    planned = top_k_bytes(size, vocabulary) if name == "top_k" else sampled_bytes(size, total / positions, vocabulary)
    assert planned * positions == pytest.approx(len(record), rel=2e-3)
