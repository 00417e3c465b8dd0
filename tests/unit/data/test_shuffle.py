from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset, ChunkDatasetWriter
from megatron_kd.data.shuffle import BUCKET_BYTES, MAX_BUCKET_BITS, ShuffleSpool, bucket_bits_for
from megatron_kd.data.tokenizer_info import plain_tokenizer_info


def shuffled(folder: Path, chunks: list[np.ndarray], seed: int, bits: int, per_call: int) -> list[list[int]]:
    folder.mkdir()
    writer = ChunkDatasetWriter(folder, plain_tokenizer_info(1000), 8)
    spool = ShuffleSpool(folder, writer.dtype, seed, bits)
    for start in range(0, len(chunks), per_call):
        part = chunks[start : start + per_call]
        spool.add(np.concatenate(part), np.array([len(chunk) for chunk in part]))
    spool.drain(writer)
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


def test_it_is_a_shuffle(tmp_path: Path, numbered: list[np.ndarray]) -> None:
    order = [chunk[0] for chunk in shuffled(tmp_path / "a", numbered, seed=1, bits=2, per_call=50)]
    assert abs(np.corrcoef(order, range(300))[0, 1]) < 0.2
    assert sum(1 for one, other in zip(order, order[1:], strict=False) if abs(other - one) == 1) < 10


def test_the_number_of_buckets_follows_the_size_and_is_bounded() -> None:
    assert bucket_bits_for(0) == bucket_bits_for(BUCKET_BYTES - 1) == 0
    assert 2 ** bucket_bits_for(100 * BUCKET_BYTES) >= 100
    assert bucket_bits_for(10**15) == MAX_BUCKET_BITS
