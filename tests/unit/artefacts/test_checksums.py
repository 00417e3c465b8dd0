import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.artefacts.checksums import BLOCK_BYTES, Checksums, ChecksumStream, LazyBlocks
from megatron_kd.errors import DataError


@given(st.binary(max_size=200), st.integers(1, 50), st.lists(st.integers(0, 40), max_size=20))
def test_pieces_make_no_difference(data: bytes, block_bytes: int, cuts: list[int]) -> None:
    stream = ChecksumStream(block_bytes)
    rest = data
    for cut in cuts:
        stream.update(rest[:cut])
        rest = rest[cut:]
    stream.update(rest)
    found = stream.finish()
    expected = [zlib.crc32(data[start : start + block_bytes]) for start in range(0, len(data), block_bytes)]
    assert found.size == len(data)
    assert found.blocks.tolist() == expected


def sidecar_of(folder: Path, name: str, data: bytes) -> Checksums:
    (folder / name).write_bytes(data)
    checksums = Checksums()
    checksums.add_file(folder, name)
    return Checksums.from_json(checksums.to_json(), folder / "checksums.json")


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5])
def test_sidecar_round_trip_verifies(tmp_path: Path, size: int) -> None:
    checksums = sidecar_of(tmp_path, "file", np.random.default_rng(0).bytes(size))
    seen: list[int] = []
    checksums.verify_file(tmp_path, "file", seen.append)
    assert sum(seen) == size


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 2 * BLOCK_BYTES + 4), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    data = bytearray(np.random.default_rng(1).bytes(2 * BLOCK_BYTES + 5))
    checksums = sidecar_of(folder, "file", bytes(data))
    data[position] ^= 1 << bit
    (folder / "file").write_bytes(bytes(data))
    with pytest.raises(DataError, match=f"block {position // BLOCK_BYTES} "):
        checksums.verify_file(folder, "file")
    blocks = LazyBlocks(folder / "file", np.frombuffer(bytes(data), np.uint8), checksums["file"])
    with pytest.raises(DataError, match="damaged"):
        blocks.touch(position, position + 1)
    other = (position // BLOCK_BYTES + 1) % 3 * BLOCK_BYTES
    blocks.touch(other, other + 1)  # the other blocks are whole


def test_a_file_of_another_size_names_both_sizes(tmp_path: Path) -> None:
    checksums = sidecar_of(tmp_path, "file", b"12345")
    (tmp_path / "file").write_bytes(b"1234")
    with pytest.raises(DataError, match="4 bytes where 5 were written"):
        checksums.check_size(tmp_path, "file")
    (tmp_path / "file").unlink()
    with pytest.raises(DataError, match="missing"):
        checksums.verify_file(tmp_path, "file")


def test_a_block_is_read_once(tmp_path: Path) -> None:
    buffer = np.zeros(3 * BLOCK_BYTES, dtype=np.uint8)
    stream = ChecksumStream()
    stream.update(buffer)
    blocks = LazyBlocks(tmp_path / "file", buffer, stream.finish())
    blocks.touch(0, 10)
    buffer[5] = 1  # after the first touch nobody looks again
    blocks.touch(0, 10)
    with pytest.raises(DataError, match="block 0"):
        LazyBlocks(tmp_path / "file", buffer, stream.finish()).touch(0, 10)


def test_a_range_over_several_blocks_is_verified_whole(tmp_path: Path) -> None:
    buffer = np.zeros(4 * BLOCK_BYTES, dtype=np.uint8)
    stream = ChecksumStream()
    stream.update(buffer)
    for damaged in range(4):
        buffer[:] = 0
        buffer[damaged * BLOCK_BYTES + 9] = 1
        blocks = LazyBlocks(tmp_path / "file", buffer, stream.finish())
        first = 1 if damaged == 0 else 0
        blocks.touch(first * BLOCK_BYTES, first * BLOCK_BYTES + 1)
        with pytest.raises(DataError, match=f"block {damaged} "):
            blocks.touch(0, 4 * BLOCK_BYTES)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"block_bytes": 4}', '{"block_bytes": 4, "files": {"a": {"bytes": 9, "crc32": "00"}}}']
)
def test_what_is_no_sidecar_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="not a checksum sidecar"):
        Checksums.from_json(text, tmp_path)
