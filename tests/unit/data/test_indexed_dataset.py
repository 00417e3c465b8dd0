from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.data.indexed_dataset import IndexedDatasetReader, IndexedDatasetWriter, dtype_for_vocab
from megatron_kd.errors import DataError

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64]


def write(prefix: Path, arrays: list[np.ndarray], dtype: np.dtype | type, per_call: int = 3) -> Checksums:
    writer = IndexedDatasetWriter(prefix, np.dtype(dtype))
    for start in range(0, len(arrays), per_call):
        part = arrays[start : start + per_call]
        writer.add(np.concatenate(part), np.array([len(array) for array in part]))
    return Checksums(writer.close())


@st.composite
def arrays_of_a_dtype(draw: st.DrawFn) -> tuple[list[np.ndarray], type]:
    dtype = draw(st.sampled_from(DTYPES))
    limits = np.iinfo(dtype)
    values = st.integers(max(int(limits.min), 0), min(int(limits.max), 2**31))
    lists = draw(st.lists(st.lists(values, max_size=12), min_size=1, max_size=12))
    return [np.array(values, dtype=dtype) for values in lists], dtype


@settings(deadline=None, max_examples=60)
@given(case=arrays_of_a_dtype(), per_call=st.integers(1, 5))
def test_round_trip_and_megatron_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[list[np.ndarray], type], per_call: int
) -> None:
    arrays, dtype = case
    prefix = tmp_path_factory.mktemp("round") / "shard"
    checksums = write(prefix, arrays, dtype, per_call)
    for name in checksums.files:
        checksums.verify_file(prefix.parent, name)
    reader = IndexedDatasetReader(prefix)
    assert reader.lengths.tolist() == [len(array) for array in arrays]
    for index, array in enumerate(arrays):
        np.testing.assert_array_equal(reader[index], array)
    if sum(map(len, arrays)):  # Megatron cannot map an empty file
        stock = IndexedDataset(str(prefix))
        assert len(stock) == len(arrays)
        assert stock.index.dtype == dtype
        assert stock.document_indices.tolist() == list(range(len(arrays) + 1))
        for index, array in enumerate(arrays):
            np.testing.assert_array_equal(stock[index], array)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32), (151_646, np.int32)])
def test_dtype_follows_megatrons_rule(vocab_size: int, dtype: type) -> None:
    assert dtype_for_vocab(vocab_size) == dtype


def test_unfinished_files_have_other_names(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "shard", np.dtype(np.int32))
    writer.add(np.arange(5), np.array([5]))
    assert [path.name for path in tmp_path.iterdir()] == ["shard.bin.tmp"]
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.bin", "shard.idx"]
    other = IndexedDatasetWriter(tmp_path / "other", np.dtype(np.int32))
    other.abort()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.bin", "shard.idx"]


def test_lengths_that_do_not_add_up_are_a_fault(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "shard", np.dtype(np.int32))
    with pytest.raises(ValueError, match="20 bytes for 4 ids of 4 bytes"):
        writer.add(np.arange(5), np.array([4]))
    writer.abort()


@pytest.mark.parametrize("extension", [".bin", ".idx"])
def test_truncated_files_are_refused(tmp_path: Path, extension: str) -> None:
    write(tmp_path / "shard", [np.arange(9), np.arange(4)], np.int32)
    path = tmp_path / f"shard{extension}"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated"):
            IndexedDatasetReader(tmp_path / "shard")
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        IndexedDatasetReader(tmp_path / "shard")


def test_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "shard", [np.arange(9)], np.int32)
    data = bytearray((tmp_path / "shard.idx").read_bytes())
    data[0] ^= 1
    (tmp_path / "shard.idx").write_bytes(bytes(data))
    with pytest.raises(DataError, match="not a Megatron index of version 1"):
        IndexedDatasetReader(tmp_path / "shard")
