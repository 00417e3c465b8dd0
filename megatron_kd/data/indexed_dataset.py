"""Megatron's indexed format, written and read with numpy: token ids in ``.bin``, their offsets in ``.idx``.

``.idx``: magic ``MMIDIDX\\0\\0``, uint64 version 1, uint8 dtype code, uint64 sequence count n, uint64 document-index
length n + 1, int32 lengths ``[n]``, int64 byte pointers ``[n]``, int64 document index ``[n + 1]`` = 0 … n: one sequence
and one document per chunk. All little-endian. ``megatron.core.datasets.indexed_dataset.IndexedDataset`` reads it.
"""

import contextlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_kd.artefacts.checksums import ChecksumStream, FileChecksums, as_bytes
from megatron_kd.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
UINT16_VOCAB_LIMIT = 65_500
_CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}
_COUNTING_PIECE = 1 << 20


def dtype_for_vocab(vocab_size: int) -> np.dtype:
    """Return the dtype of ids by Megatron's rule: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCAB_LIMIT else np.dtype(np.int32)


class IndexedDatasetWriter:
    """Writes one ``.bin``/``.idx`` pair under temporary names and renames both at :meth:`close`.

    Args:
        prefix: path without the extension.
        dtype: of the ids on disk.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self._bin = open(_temporary(self.prefix, ".bin"), "wb")
        self._checksums = ChecksumStream()
        self._lengths: list[np.ndarray] = []
        self.num_chunks = 0
        self.num_tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append chunks.

        Args:
            ids: the chunks' ids one after another, any integer dtype, ``[sum(lengths)]``.
            lengths: ids per chunk, ``[n]``.
        """
        data = np.ascontiguousarray(ids, dtype=self.dtype)
        self.add_bytes(as_bytes(data), lengths)

    def add_bytes(self, data: bytes | memoryview | np.ndarray, lengths: np.ndarray) -> None:
        """Append chunks whose ids are already bytes of ``dtype``, one after another."""
        total = int(np.sum(lengths, dtype=np.int64))
        if total * self.dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes for {total} ids of {self.dtype.itemsize} bytes")
        self._bin.write(as_bytes(data))
        self._checksums.update(data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32).copy())
        self.num_chunks += len(lengths)
        self.num_tokens += total

    def close(self) -> dict[str, FileChecksums]:
        """Finish both files, and return the checksums of ``<name>.bin`` and ``<name>.idx``."""
        with self._bin as file:
            file.flush()
            os.fsync(file.fileno())
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        index = write_index(_temporary(self.prefix, ".idx"), lengths, self.dtype)
        for extension in (".bin", ".idx"):
            os.rename(_temporary(self.prefix, extension), self.prefix.with_name(self.prefix.name + extension))
        return {f"{self.prefix.name}.bin": self._checksums.finish(), f"{self.prefix.name}.idx": index}

    def abort(self) -> None:
        """Give up: remove the temporary files."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._bin.close()
        for extension in (".bin", ".idx"):
            _temporary(self.prefix, extension).unlink(missing_ok=True)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> FileChecksums:
    """Write an ``.idx`` for chunks of these lengths, stored one after another from byte 0."""
    checksums = ChecksumStream()
    with open(path, "wb") as file:

        def put(data: bytes | np.ndarray) -> None:
            file.write(as_bytes(data))
            checksums.update(data)

        put(HEADER.pack(MAGIC, 1, _CODE_OF[np.dtype(dtype)], len(lengths), len(lengths) + 1))
        put(np.ascontiguousarray(lengths, dtype="<i4"))
        _put_pointers(put, lengths, np.dtype(dtype).itemsize)
        for start in range(0, len(lengths) + 1, _COUNTING_PIECE):
            put(np.arange(start, min(start + _COUNTING_PIECE, len(lengths) + 1), dtype="<i8"))
        file.flush()
        os.fsync(file.fileno())
    return checksums.finish()


def _put_pointers(put: Callable[[np.ndarray], None], lengths: np.ndarray, itemsize: int) -> None:
    offset = 0
    for start in range(0, len(lengths), _COUNTING_PIECE):
        ends = offset + np.cumsum(lengths[start : start + _COUNTING_PIECE], dtype="<i8") * itemsize
        put(np.concatenate([np.array([offset], dtype="<i8"), ends[:-1]]))
        offset = int(ends[-1])


class IndexedDatasetReader:
    """One ``.bin``/``.idx`` pair, memory-mapped.

    Attributes:
        lengths: ids per chunk, int32 ``[n]``.
        pointers: byte offset of each chunk, int64 ``[n]``.
        dtype: of the ids on disk.
        buffer: the ``.bin`` file, uint8 ``[bytes]``.

    Args:
        prefix: path without the extension.
        unused_bytes: bytes at the end of ``.bin`` that are in no chunk.

    Raises:
        DataError: a file is missing, or the two do not agree.
    """

    checks_documents = True

    def __init__(self, prefix: str | Path, unused_bytes: int = 0) -> None:
        prefix = Path(prefix)
        self.bin_path = prefix.with_name(prefix.name + ".bin")
        self.index_path = prefix.with_name(prefix.name + ".idx")
        for path in (self.bin_path, self.index_path):
            if not path.is_file():
                raise DataError(f"{path}: missing; a shard is a .bin and an .idx file, copy both")
        index = _map_bytes(self.index_path)
        self.dtype, count, documents = self._read_header(index)
        expected = HEADER.size + 12 * count + (8 * documents if self.checks_documents else 0)
        if len(index) < expected or (self.checks_documents and len(index) > expected):
            raise DataError(
                f"{self.index_path}: {len(index)} bytes where its header announces {expected}; copy it again"
            )
        self.lengths = index[HEADER.size : HEADER.size + 4 * count].view("<i4")
        self.pointers = index[HEADER.size + 4 * count : HEADER.size + 12 * count].view("<i8")
        self.buffer = _map_bytes(self.bin_path)
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if count else 0
        if end + unused_bytes != len(self.buffer):
            raise DataError(f"{self.bin_path}: {len(self.buffer)} bytes where the index ends at {end}; copy it again")

    def _read_header(self, index: np.ndarray) -> tuple[np.dtype, int, int]:
        if len(index) < HEADER.size:
            raise DataError(f"{self.index_path}: {len(index)} bytes, shorter than an index header; copy it again")
        magic, version, code, count, documents = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC or version != 1 or code not in DTYPE_CODES:
            raise DataError(
                f"{self.index_path}: not a Megatron index of version 1 "
                f"(magic {magic!r}, version {version}, dtype {code})"
            )
        return DTYPE_CODES[code], count, documents

    def __len__(self) -> int:
        return len(self.lengths)

    def byte_range(self, index: int) -> tuple[int, int]:
        """Return where a chunk's bytes start and stop in ``.bin``."""
        start = int(self.pointers[index])
        return start, start + int(self.lengths[index]) * self.dtype.itemsize

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a read-only view of one chunk's ids, ``dtype`` ``[length]``."""
        start, stop = self.byte_range(index)
        return self.buffer[start:stop].view(self.dtype)


class ForeignIndex(IndexedDatasetReader):
    """A pair that another program wrote: its document index is not read, its sequences must follow one another.

    Raises:
        DataError: they do not.
    """

    checks_documents = False

    def __init__(self, prefix: str | Path) -> None:
        super().__init__(prefix)
        place = 0
        for start in range(0, len(self.lengths), _COUNTING_PIECE):
            sizes = self.lengths[start : start + _COUNTING_PIECE].astype(np.int64) * self.dtype.itemsize
            ends = place + np.cumsum(sizes)
            if not np.array_equal(self.pointers[start : start + _COUNTING_PIECE], ends - sizes):
                raise DataError(f"{self.index_path}: its sequences are not stored one after another; rewrite the file")
            place = int(ends[-1])


def _map_bytes(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)


def _temporary(prefix: Path, extension: str) -> Path:
    return prefix.with_name(f"{prefix.name}{extension}.tmp")
