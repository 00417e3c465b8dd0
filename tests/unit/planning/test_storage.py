"""Bytes on disk against a dataset and a score file that were really written, and against published sizes."""

import numpy
import pytest

from megatron_kd.data.chunk_dataset import write_chunk_dataset
from megatron_kd.data.tokenizer_info import plain_tokenizer_info
from megatron_kd.planning.storage import cache_sizes, corpus_bytes, score_bytes


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
    full, top, sampled = cache_sizes(50e9, 151_936)
    assert 2 * full.total == pytest.approx(30e15, rel=0.02)  # the paper counts 4 bytes a logit: 30 PB
    assert sampled.bytes_per_token == pytest.approx(48, rel=0.02) and top.bytes_per_token == 384
