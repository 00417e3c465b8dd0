"""Parallel copies are the bytes and checksums that writing chunk after chunk gives."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.data import copy_chunks as module
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.copy_chunks import copy_chunks
from megatron_kd.errors import DataError
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset
from tests.reference.full_disk import said_on_a_full_disk

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ChunkDataset:
    """6 MB in three shards."""
    generator = np.random.default_rng(3)
    chunks = (generator.integers(0, 100, generator.integers(1, 2001)) for _ in range(3000))
    return write_chunk_dataset(
        tmp_path_factory.mktemp("data") / "large", chunks, plain_tokenizer_info(100), 2000, chunks_per_shard=1100
    )


def write(dataset: ChunkDataset, kept: np.ndarray, output: Path, per_shard: int, parallel: bool) -> ChunkDataset:
    with (
        building(output) as folder,
        closing(ChunkDatasetWriter(folder, dataset.tokenizer_info(), dataset.seq_length, per_shard)) as writer,
    ):
        if parallel:
            copy_chunks(dataset, kept, writer, threads=3)
        else:
            for index in kept.tolist():
                writer.add(dataset[index], dataset.lengths[index : index + 1])
        writer.finish({"tool": "test"}, (), dataset.root_fingerprint, kept)
    return ChunkDataset.open(output)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("per_shard", [1100, 700, 5000])
def test_the_same_files_as_chunk_after_chunk(
    large: ChunkDataset, share: float, per_shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1 << 20)
    kept = np.flatnonzero(np.random.default_rng(5).random(3000) < share)
    ours = write(large, kept, tmp_path / "ours", per_shard, parallel=True)
    expected = write(large, kept, tmp_path / "expected", per_shard, parallel=False)
    names = sorted(path.name for path in expected.path.iterdir() if path.is_file())
    assert names == sorted(path.name for path in ours.path.iterdir() if path.is_file())
    for name in names:
        assert (ours.path / name).read_bytes() == (expected.path / name).read_bytes() or name == "manifest.json"
    assert ours.fingerprint == expected.fingerprint
    ours.verify()


def test_ids_wider_than_the_vocabulary_needs_stay_so(tmp_path: Path) -> None:
    """As adopted files may have them: int32 for 100 ids."""
    with building(tmp_path / "wide") as folder:
        writer = ChunkDatasetWriter(folder, plain_tokenizer_info(100), 16)
        writer.dtype = np.dtype(np.int32)
        for length in (3, 5, 7):
            writer.add(np.arange(1, length), np.array([length - 1]))
        writer.finish({"tool": "test"})
    wide = ChunkDataset.open(tmp_path / "wide")
    out = write(wide, np.array([0, 2]), tmp_path / "out", 10, parallel=True)
    assert out.dtype == np.int32 and out[1].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_flipped_bit_ends_the_copy(large: ChunkDataset, tmp_path: Path) -> None:
    path = large.shards[1].bin_path
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[1_200_000] ^= 16
    path.write_bytes(bytes(damaged))
    try:
        with pytest.raises(DataError, match=r"chunks-00001.bin: block 1 has checksum"):
            write(ChunkDataset.open(large.path), np.arange(0, 3000, 3), tmp_path / "out", 1100, parallel=True)
    finally:
        path.write_bytes(whole)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_leaves_nothing(large: ChunkDataset, tmp_path: Path) -> None:
    """In a process whose files may not grow beyond 300 kB, as on a full disk: an error, and no folder of any name."""
    ids = np.arange(0, 3000, 2)
    assert said_on_a_full_disk(lambda: write(large, ids, tmp_path / "out", 1100, parallel=True), 300_000) == "full"
    assert not list(tmp_path.iterdir())
