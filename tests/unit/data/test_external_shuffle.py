from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data import external_shuffle as shuffle
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.chunking import Chunks
from megatron_kd.data.external_shuffle import BUCKET_BYTES, MAX_BUCKET_BITS, ExternalShuffle, bucket_bits_for
from tests.reference.datasets import plain_tokenizer_info


def shuffled(folder: Path, chunks: list[np.ndarray], seed: int, bits: int, per_call: int) -> list[list[int]]:
    folder.mkdir()
    writer = ChunkDatasetWriter(folder, plain_tokenizer_info(1000), 8)
    spool = ExternalShuffle(folder, writer.dtype, seed, bits)
    for start in range(0, len(chunks), per_call):
        part = chunks[start : start + per_call]
        spool.add(Chunks(np.concatenate(part), np.array([len(chunk) for chunk in part])))
    for chunks_in_order in spool.drain():
        writer.add(chunks_in_order.ids, chunks_in_order.lengths)
    writer.finish({"tool": "test"})
    assert not list(folder.glob("bucket-*"))
    dataset = ChunkDataset.open(folder)
    return [dataset[index].tolist() for index in range(len(dataset))]


@pytest.fixture
def numbered() -> list[np.ndarray]:
    """300 chunks, each its own number repeated 1 to 9 times."""
    return [np.full(1 + number % 9, number) for number in range(300)]


def test_the_order_depends_on_the_seed_alone(tmp_path: Path, numbered: list[np.ndarray]) -> None:
    expected = shuffled(tmp_path / "a", numbered, seed=5, bits=0, per_call=300)
    assert sorted(chunk[0] for chunk in expected) == list(range(300))
    assert all(len(chunk) == 1 + chunk[0] % 9 for chunk in expected)
    assert shuffled(tmp_path / "b", numbered, seed=5, bits=3, per_call=7) == expected
    assert shuffled(tmp_path / "c", numbered, seed=5, bits=9, per_call=101) == expected
    assert shuffled(tmp_path / "d", numbered, seed=6, bits=3, per_call=7) != expected


def test_what_waits_for_its_bucket_is_bounded_and_changes_nothing(
    tmp_path: Path, numbered: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = shuffled(tmp_path / "a", numbered, seed=5, bits=4, per_call=300)
    monkeypatch.setattr(shuffle, "PENDING_BYTES", 100)
    assert shuffled(tmp_path / "b", numbered, seed=5, bits=4, per_call=7) == expected


def test_domains_and_prompt_lengths_stay_with_their_chunks(tmp_path: Path, numbered: list[np.ndarray]) -> None:
    spool = ExternalShuffle(tmp_path, np.dtype(np.uint16), 3, 2)
    lengths = np.array([len(chunk) for chunk in numbered])
    domains = np.array([chunk[0] % 7 for chunk in numbered])
    spool.add(Chunks(np.concatenate(numbered), lengths, domains, (lengths - 1).astype(np.int32)))
    found = 0
    for chunks in spool.drain():
        firsts = chunks.ids[np.cumsum(chunks.lengths) - chunks.lengths]
        assert (chunks.prompt_lengths == chunks.lengths - 1).all() and (chunks.domains == firsts % 7).all()
        found += len(firsts)
    assert found == len(numbered)


def test_it_is_a_shuffle(tmp_path: Path, numbered: list[np.ndarray]) -> None:
    order = [chunk[0] for chunk in shuffled(tmp_path / "a", numbered, seed=1, bits=2, per_call=50)]
    assert abs(np.corrcoef(order, range(300))[0, 1]) < 0.2
    assert sum(1 for one, other in zip(order, order[1:], strict=False) if abs(other - one) == 1) < 10


def test_the_number_of_buckets_follows_the_size_and_is_bounded() -> None:
    assert bucket_bits_for(0) == bucket_bits_for(BUCKET_BYTES - 1) == 0
    assert 2 ** bucket_bits_for(100 * BUCKET_BYTES) >= 100
    assert bucket_bits_for(10**15) == MAX_BUCKET_BITS
