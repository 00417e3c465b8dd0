"""Checksums of files in blocks of 1 MiB, kept in a sidecar, so that a 200 GB dataset opens in seconds.

``checksums.json`` of an artefact lists, for every file, its size and the CRC-32 of each block as eight hexadecimal
digits. The manifest holds the sidecar's own SHA-256. Small files are verified when the artefact is opened, large ones
block by block at first touch (:class:`LazyBlocks`), everything on request (:meth:`Checksums.verify_file`).
"""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_kd.errors import DataError

BLOCK_BYTES = 1 << 20
SIDECAR_NAME = "checksums.json"


@dataclass(frozen=True)
class FileChecksums:
    """Size of a file in bytes, and CRC-32 of each of its blocks: uint32 ``[ceil(size / block_bytes)]``."""

    size: int
    blocks: np.ndarray
    block_bytes: int = BLOCK_BYTES


def as_bytes(data: bytes | memoryview | np.ndarray) -> memoryview:
    """Return a view of contiguous data as bytes; nothing is copied."""
    if isinstance(data, np.ndarray):
        return data.reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B") if len(data) else memoryview(b"")


class ChecksumStream:
    """Computes the CRC-32 of every block of a byte stream that arrives in pieces."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._blocks: list[int] = []
        self._crc = 0
        self._size = 0

    def update(self, data: bytes | memoryview | np.ndarray) -> None:
        """Append contiguous bytes."""
        view = as_bytes(data)
        while len(view):
            room = self._block_bytes - self._size % self._block_bytes
            piece = view[:room]
            self._crc = zlib.crc32(piece, self._crc)
            self._size += len(piece)
            view = view[room:]
            if self._size % self._block_bytes == 0:
                self._blocks.append(self._crc)
                self._crc = 0

    def finish(self) -> FileChecksums:
        """Return the checksums of everything appended."""
        blocks = self._blocks + ([self._crc] if self._size % self._block_bytes else [])
        return FileChecksums(self._size, np.array(blocks, dtype=np.uint32), self._block_bytes)


@dataclass
class Checksums:
    """The contents of a sidecar: file name → :class:`FileChecksums`."""

    files: dict[str, FileChecksums] = field(default_factory=dict)

    def add_file(self, folder: Path, name: str) -> None:
        """Read a small file that is already written, and record its checksums."""
        stream = ChecksumStream()
        with open(folder / name, "rb") as file:
            while piece := file.read(BLOCK_BYTES):
                stream.update(piece)
        self.files[name] = stream.finish()

    def to_json(self) -> str:
        """Return the sidecar's text; equal contents give equal text."""
        files = {
            name: {"bytes": entry.size, "crc32": entry.blocks.astype(">u4").tobytes().hex()}
            for name, entry in sorted(self.files.items())
        }
        return json.dumps({"algorithm": "crc32", "block_bytes": BLOCK_BYTES, "files": files}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> "Checksums":
        """Parse a sidecar.

        Raises:
            DataError: the text is not a sidecar.
        """
        try:
            body = json.loads(text)
            block_bytes = int(body["block_bytes"])
            entries = {name: _entry(entry, block_bytes) for name, entry in body["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: not a checksum sidecar ({error})") from None
        return cls(entries)

    def __getitem__(self, name: str) -> FileChecksums:
        return self.files[name]

    def check_size(self, folder: Path, name: str) -> None:
        """Compare a file's size with the recorded one.

        Raises:
            DataError: the file is missing or has another size (names both).
        """
        path = folder / name
        entry = self.files.get(name)
        if entry is None:
            raise DataError(f"{path}: not listed in {SIDECAR_NAME}; the artefact is damaged, make it again")
        if not path.is_file():
            raise DataError(
                f"{path}: missing, though {SIDECAR_NAME} lists it; copy it again or make the artefact again"
            )
        size = path.stat().st_size
        if size != entry.size:
            raise DataError(f"{path}: {size} bytes where {entry.size} were written; copy it again")

    def verify_file(self, folder: Path, name: str, on_bytes: Callable[[int], object] | None = None) -> None:
        """Read a whole file and compare every block; ``on_bytes`` is called with the size of each block.

        Raises:
            DataError: the file is missing or of another size, or a block differs (names the block and both checksums).
        """
        self.check_size(folder, name)
        entry = self.files[name]
        with open(folder / name, "rb") as file:
            for block, expected in enumerate(entry.blocks):
                piece = file.read(entry.block_bytes)
                _compare(folder / name, block, int(expected), piece)
                if on_bytes is not None:
                    on_bytes(len(piece))


class LazyBlocks:
    """Verifies each block of a memory-mapped file when it is first touched.

    Args:
        path: the file, for messages.
        buffer: its bytes, uint8 ``[size]``.
        checksums: of the file as it was written.
    """

    def __init__(self, path: Path, buffer: np.ndarray, checksums: FileChecksums) -> None:
        self._path = path
        self._buffer = buffer
        self._checksums = checksums
        self._verified = np.zeros(len(checksums.blocks), dtype=bool)

    def touch(self, start: int, stop: int) -> None:
        """Verify the blocks of bytes ``[start, stop)`` that were not verified before.

        Raises:
            DataError: a block differs (names the block and both checksums).
        """
        if stop <= start:
            return
        size = self._checksums.block_bytes
        first, last = start // size, (stop - 1) // size
        if self._verified[first] and (first == last or self._verified[first : last + 1].all()):
            return
        for block in range(first, last + 1):
            if not self._verified[block]:
                piece = self._buffer[block * size : (block + 1) * size]
                _compare(self._path, block, int(self._checksums.blocks[block]), piece)
                self._verified[block] = True


def _entry(entry: Mapping[str, object], block_bytes: int) -> FileChecksums:
    blocks = np.frombuffer(bytes.fromhex(str(entry["crc32"])), dtype=">u4").astype(np.uint32)
    size = int(str(entry["bytes"]))
    if len(blocks) != -(-size // block_bytes):
        raise ValueError(f"{len(blocks)} block checksums for {size} bytes")
    return FileChecksums(size, blocks, block_bytes)


def _compare(path: Path, block: int, expected: int, piece: bytes | np.ndarray) -> None:
    found = zlib.crc32(as_bytes(piece))
    if found != expected:
        raise DataError(
            f"{path}: block {block} has checksum {found:08x} where {expected:08x} was written; "
            "the file is damaged, copy it again or make the artefact again"
        )
