"""One pair of files of a cache, written so that a writer killed at any moment goes on where it last committed.

``knowledge-00000.bin`` holds records one after another, ``knowledge-00000.idx`` 28 bytes about each (``INDEX_DTYPE``).
While the cache is written, ``progress/knowledge-00000.json`` states how much of both is committed, with the checksums
of those bytes: it is replaced, whole, after the bytes have reached the disk. What lies behind a commit is cut off.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_kd.data.artefact_folder import write_file
from megatron_kd.data.checksums import BLOCK_BYTES, Checksums, ChecksumStream, FileChecksums

INDEX_DTYPE = np.dtype(
    [("token_hash", "<u8"), ("end", "<u8"), ("positions", "<u4"), ("tokens", "<u4"), ("ids", "<u4")]
)
"""Of a chunk: hash of its ids, where its record ends, positions, those with knowledge, and ids kept of them."""
PROGRESS_FOLDER = "progress"


def shard_name(number: int) -> str:
    """Name of a shard's files, without their ending."""
    return f"knowledge-{number:05d}"


@dataclass(frozen=True)
class Commit:
    """How far a shard is: whole chunks, whether it is finished, and the checksums of the bytes that hold them."""

    chunks: int
    complete: bool
    checksums: Checksums

    @classmethod
    def read(cls, folder: Path, number: int) -> "Commit | None":
        """The last commit of a shard whose bytes are all there and as they were; None where there is none.

        The bytes of a finished shard are not read again, their number is compared.
        """
        path = _progress_path(folder, number)
        if not path.is_file():
            return None
        body = json.loads(path.read_text("utf-8"))
        commit = cls(body["chunks"], body["complete"], Checksums.from_json(json.dumps(body["checksums"]), path))
        return commit if commit._holds(folder) else None

    def write(self, folder: Path, number: int) -> None:
        """Replace the shard's commit."""
        body = {"chunks": self.chunks, "complete": self.complete, "checksums": json.loads(self.checksums.to_json())}
        write_file(_progress_path(folder, number), json.dumps(body))

    def _holds(self, folder: Path) -> bool:
        for name, expected in self.checksums.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size != expected.size if self.complete else size < expected.size:
                return False
            if not self.complete and not _same(_read_checksums(path, expected.size).finish(), expected):
                return False
        return True


class ShardWriter:
    """Appends records to one shard.

    Args:
        folder: the cache under construction.
        number: of the shard.
        commit: where to go on; None begins anew.
        commit_seconds: the least time between two commits.
    """

    def __init__(self, folder: Path, number: int, commit: Commit | None, commit_seconds: float) -> None:
        self._folder, self._number, self._commit_seconds = folder, number, commit_seconds
        self._committed_at = time.monotonic()
        self.chunks = commit.chunks if commit else 0
        self._files: dict[str, tuple[BinaryIO, ChecksumStream]] = {}
        for ending in ("bin", "idx"):
            name = f"{shard_name(number)}.{ending}"
            size = commit.checksums[name].size if commit else 0
            self._files[ending] = (_open_at(folder / name, size), _read_checksums(folder / name, size))
        self._end = commit.checksums[f"{shard_name(number)}.bin"].size if commit else 0

    def add(self, records: list[np.ndarray], index: np.ndarray) -> None:
        """Append the records (uint8) of some chunks, and commit if it is time to.

        Args:
            index: ``INDEX_DTYPE`` [chunks]; its ``end`` is filled in here.
        """
        index["end"] = self._end + np.cumsum([len(record) for record in records])
        self._append("bin", np.concatenate(records).tobytes())
        self._append("idx", index.tobytes())
        self._end = int(index["end"][-1])
        self.chunks += len(records)
        if time.monotonic() - self._committed_at >= self._commit_seconds:
            self.commit()

    def commit(self, complete: bool = False) -> None:
        """Make everything so far survive; ``complete`` says that nothing follows."""
        checksums = Checksums()
        for ending, (file, stream) in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            checksums.files[f"{shard_name(self._number)}.{ending}"] = stream.finish()
        Commit(self.chunks, complete, checksums).write(self._folder, self._number)
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Close the files, whether committed or not."""
        for file, _ in self._files.values():
            file.close()

    def _append(self, ending: str, data: bytes) -> None:
        file, stream = self._files[ending]
        file.write(data)
        stream.update(data)


def _progress_path(folder: Path, number: int) -> Path:
    return folder / PROGRESS_FOLDER / f"{shard_name(number)}.json"


def _open_at(path: Path, size: int) -> BinaryIO:
    """A file to append to behind its first ``size`` bytes; what follows them is cut off."""
    file = open(path, "r+b" if size else "wb")  # noqa: SIM115 - closed by ShardWriter.close
    file.truncate(size)
    file.seek(size)
    return file


def _read_checksums(path: Path, size: int) -> ChecksumStream:
    stream = ChecksumStream()
    with open(path, "rb") as file:
        while size:
            piece = file.read(min(size, BLOCK_BYTES))
            if not piece:
                break
            stream.update(piece)
            size -= len(piece)
    return stream


def _same(found: FileChecksums, expected: FileChecksums) -> bool:
    return found.size == expected.size and np.array_equal(found.blocks, expected.blocks)
