import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer
from megatron_kd.errors import DataError
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset
from tests.reference.full_disk import said_on_a_full_disk
from tests.unit.conftest import die_at_call

# the forked children use numpy and files alone, never the threads of the parent
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_reads_what_was_written(dataset: ChunkDataset, chunks: list[np.ndarray]) -> None:
    assert len(dataset) == dataset.num_chunks == 40
    assert dataset.num_tokens == sum(map(len, chunks))
    assert [len(shard) for shard in dataset.shards] == [15, 15, 10]
    assert dataset.lengths.tolist() == [len(chunk) for chunk in chunks]
    assert dataset.lengths.dtype == np.int32
    for index, chunk in enumerate(chunks):
        np.testing.assert_array_equal(dataset[index], chunk)
    assert dataset.root_fingerprint == dataset.fingerprint
    assert dataset.chunk_ids.tolist() == list(range(40))
    assert dataset.root_ids(np.array([3, 1])).tolist() == [3, 1]
    assert (dataset.seq_length, dataset.vocab_size, dataset.eos_id, dataset.pad_id) == (16, 100, 0, 0)
    dataset.verify()


def test_a_disk_that_fills_with_the_chunk_ids_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with building(tmp_path / "selection") as folder:
            writer = ChunkDatasetWriter(folder, plain_tokenizer_info(10), 8)
            writer.add(np.arange(10), np.array([5, 5]))
            writer.finish({"tool": "test"}, chunk_ids=np.arange(2000))

    assert said_on_a_full_disk(write, 5000) == "full"
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=30)
@given(
    lists=st.lists(st.lists(st.integers(0, 69_999), min_size=1, max_size=9), min_size=1, max_size=30),
    vocab_size=st.sampled_from([70_000, 65_500, 65_499]),
    chunks_per_shard=st.integers(1, 7),
    picks=st.lists(st.integers(0, 10**6), max_size=20),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    lists: list[list[int]],
    vocab_size: int,
    chunks_per_shard: int,
    picks: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("round") / "dataset"
    chunks = [np.minimum(np.array(ids), vocab_size - 1) for ids in lists]
    dataset = write_chunk_dataset(folder, chunks, plain_tokenizer_info(vocab_size), 8, chunks_per_shard)
    indices = np.array([pick % len(chunks) for pick in picks], dtype=np.int64)
    ids, lengths = dataset.gather(indices, 9)
    for row, index in enumerate(indices):
        np.testing.assert_array_equal(ids[row, : lengths[row]], chunks[index])
        assert (ids[row, lengths[row] :] == dataset.pad_id).all()
    for number, shard in enumerate(dataset.shards):
        stock = IndexedDataset(str(folder / f"chunks-{number:05d}"))
        for index in range(len(shard)):
            np.testing.assert_array_equal(stock[index], chunks[number * chunks_per_shard + index])


def test_an_identical_rebuild_has_the_same_fingerprint_and_files(
    tmp_path: Path, dataset: ChunkDataset, chunks: list[np.ndarray]
) -> None:
    again = write_chunk_dataset(tmp_path / "again", chunks, plain_tokenizer_info(100), 16, chunks_per_shard=15)
    assert again.fingerprint == dataset.fingerprint
    for path in sorted(dataset.path.iterdir()):
        assert path.read_bytes() == (again.path / path.name).read_bytes(), path.name
    changed = [*chunks[:-1], chunks[-1] ^ 1]
    assert (
        write_chunk_dataset(tmp_path / "c", changed, plain_tokenizer_info(100), 16, 15).fingerprint
        != dataset.fingerprint
    )
    assert (
        write_chunk_dataset(tmp_path / "d", chunks, plain_tokenizer_info(101), 16, 15).fingerprint
        != dataset.fingerprint
    )
    assert (
        write_chunk_dataset(tmp_path / "e", chunks, plain_tokenizer_info(100), 17, 15).fingerprint
        != dataset.fingerprint
    )


def use_everything(path: Path) -> None:
    dataset = ChunkDataset.open(path)
    dataset.gather(np.arange(len(dataset)), dataset.seq_length + 1)


def test_a_flipped_bit_in_any_file_is_found_before_anything_is_computed(dataset: ChunkDataset) -> None:
    generator = np.random.default_rng(3)
    use_everything(dataset.path)
    for path in sorted(dataset.path.iterdir()):
        whole = path.read_bytes()
        for position in generator.integers(0, len(whole), 25).tolist():
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(damaged))
            with pytest.raises(DataError):
                use_everything(dataset.path)
        path.write_bytes(whole)
    use_everything(dataset.path)


def test_a_truncated_or_missing_file_is_found_when_opening(dataset: ChunkDataset) -> None:
    for path in sorted(dataset.path.iterdir()):
        whole = path.read_bytes()
        for size in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(DataError, match=path.name):
                ChunkDataset.open(dataset.path)
        path.unlink()
        with pytest.raises(DataError, match=path.name):
            ChunkDataset.open(dataset.path)
        path.write_bytes(whole)


def test_shards_of_another_dataset_are_refused(tmp_path: Path, dataset: ChunkDataset) -> None:
    other = write_chunk_dataset(tmp_path / "other", [np.arange(5)] * 40, plain_tokenizer_info(100), 16, 15)
    shutil.copyfile(other.path / "chunks-00000.bin", dataset.path / "chunks-00000.bin")
    shutil.copyfile(other.path / "chunks-00000.idx", dataset.path / "chunks-00000.idx")
    with pytest.raises(DataError, match="chunks-00000"):
        ChunkDataset.open(dataset.path)


def test_verified_ranges_are_the_bytes_of_the_chunks(dataset: ChunkDataset, chunks: list[np.ndarray]) -> None:
    reader = dataset.shards[1]
    starts, stops = (np.array([reader.byte_range(index)[end] for index in (0, 2, 7)]) for end in (0, 1))
    expected = np.concatenate([chunks[15 + index] for index in (0, 2, 7)]).astype(dataset.dtype)
    found = np.concatenate(dataset.verified_ranges(1, starts, stops)).view(dataset.dtype)
    np.testing.assert_array_equal(found, expected)


def test_a_chunk_outside_or_too_long_is_an_error(dataset: ChunkDataset) -> None:
    for index in (-1, 40):
        with pytest.raises(IndexError, match="40"):
            dataset[index]
        with pytest.raises(IndexError, match="40"):
            dataset.gather(np.array([index]), 17)
    longest = int(dataset.lengths.argmax())
    with pytest.raises(DataError, match="set data.seq_length to the dataset's 16"):
        dataset.gather(np.array([longest]), int(dataset.lengths.max()) - 1)


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([100], [1], "outside a vocabulary of 100"),
        ([-1], [1], "outside"),
        ([1] * 18, [18], r"outside 1…17"),
        ([], [0], "outside 1"),
    ],
)
def test_chunks_that_cannot_be_are_a_fault(tmp_path: Path, ids: list[int], lengths: list[int], message: str) -> None:
    writer = ChunkDatasetWriter(tmp_path, plain_tokenizer_info(100), 16)
    with pytest.raises(ValueError, match=message):
        writer.add(np.array(ids), np.array(lengths))


@pytest.mark.parametrize("name", ["fsync", "rename", "open"])
def test_a_writer_killed_at_any_step_leaves_nothing_that_looks_whole(
    tmp_path: Path, chunks: list[np.ndarray], name: str
) -> None:
    tokenizer = plain_tokenizer_info(100)
    expected = write_chunk_dataset(tmp_path / "expected", chunks, tokenizer, 16, 15).fingerprint
    finished = killed = 0
    for number in range(1, 200):
        output = tmp_path / "killed"
        child = os.fork()
        if child == 0:
            die_at_call(os, name, number)
            write_chunk_dataset(output, chunks, tokenizer, 16, 15)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            finished += 1
        if output.exists():  # killed after the last rename at the earliest: then it is whole
            assert ChunkDataset.open(output).fingerprint == expected
            ChunkDataset.open(output).verify()
            shutil.rmtree(output)
        if finished:
            break
    assert finished == 1 and killed >= 3
    for folder in tmp_path.glob("killed.tmp-*"):
        os.utime(folder, (0, 0))
    assert write_chunk_dataset(tmp_path / "killed", chunks, tokenizer, 16, 15).fingerprint == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "killed"]  # abandoned folders are gone


def test_files_travel_with_the_dataset(tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    dataset = write_chunk_dataset(tmp_path / "d", [np.arange(5)], tokenizer.info, 8)
    assert load_tokenizer(dataset.tokenizer_path).info.hash == tokenizer.info.hash
    dataset.verify()
    derived = write_chunk_dataset(tmp_path / "e", [np.arange(5)], dataset.tokenizer_info(), 8)
    assert derived.fingerprint == dataset.fingerprint
    for name, contents in tokenizer.info.files.items():
        assert (derived.tokenizer_path / name).read_bytes() == contents
