"""A teacher cache under construction: shard files that grow, commits from which a killed run resumes, the manifest.

    claim the work store → shards, by any rank, each with commits → (main rank) manifest, then the output's name

``knowledge-00000.bin`` holds records one after another, ``knowledge-00000.idx`` 28 bytes about each (``INDEX_DTYPE``).
While the cache is written, part ``knowledge-00000`` of the work store says how much of both is committed, with the
checksums of those bytes: it is replaced, whole, when they have reached the disk. What follows a commit is cut off.
"""

import io
import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.artefacts.checksums import BLOCK_BYTES, Checksums, ChecksumStream
from megatron_kd.artefacts.manifest import MANIFEST_NAME, fingerprint_of, read_manifest, versions, write_manifest
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.teachers.cache.cache_reader import CHUNK_IDS_NAME, INDEX_DTYPE, KIND

logger = logging.getLogger(__name__)

READING_THREADS = 8


def shard_name(number: int) -> str:
    """Return the name of a shard's files, without their ending, and of its commit."""
    return f"knowledge-{number:05d}"


@dataclass(frozen=True)
class Commit:
    """The state of a shard: whole chunks, whether it is complete, and the checksums of the bytes that hold them."""

    chunks: int
    complete: bool
    checksums: Checksums

    @classmethod
    def read(cls, store: WorkStore, number: int) -> "Commit | None":
        """Read the last commit of a shard; None where there is none, or it is damaged."""
        name = shard_name(number)
        if not store.is_whole(name):
            return None
        body = json.loads(store.read(name).tobytes())
        return cls(
            body["chunks"], body["complete"], Checksums.from_json(json.dumps(body["checksums"]), store.path_of(name))
        )

    def write(self, store: WorkStore, number: int) -> None:
        """Replace the shard's commit."""
        body = {"chunks": self.chunks, "complete": self.complete, "checksums": json.loads(self.checksums.to_json())}
        store.write(shard_name(number), json.dumps(body).encode())

    def holds(self, folder: Path) -> bool:
        """Return whether the committed bytes are all there, and unchanged."""
        for name, expected in self.checksums.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size != expected.size if self.complete else size < expected.size:
                return False
            found = _read_checksums(path, expected.size).finish()
            if found.size != expected.size or not np.array_equal(found.blocks, expected.blocks):
                return False
        return True


class ShardWriter:
    """Appends records to one shard.

    Args:
        store: the cache under construction.
        number: the shard's.
        commit: where to resume; None begins anew.
        commit_seconds: the least time between two commits.
    """

    def __init__(self, store: WorkStore, number: int, commit: Commit | None, commit_seconds: float) -> None:
        self._store, self._number, self._commit_seconds = store, number, commit_seconds
        self._committed_at = time.monotonic()
        self.chunks = commit.chunks if commit else 0
        self._files: dict[str, tuple[BinaryIO, ChecksumStream]] = {}
        for ending in ("bin", "idx"):
            name = f"{shard_name(number)}.{ending}"
            size = commit.checksums[name].size if commit else 0
            path = store.folder / name
            self._files[ending] = (_open_at(path, size), _read_checksums(path, size))
        self._end = commit.checksums[f"{shard_name(number)}.bin"].size if commit else 0

    def add(self, records: list[np.ndarray], index: np.ndarray) -> None:
        """Append the records (uint8) of some chunks, and commit when it is time.

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
        """Make everything so far survive a kill; ``complete`` says that nothing follows."""
        checksums = Checksums()
        for ending, (file, stream) in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            checksums.files[f"{shard_name(self._number)}.{ending}"] = stream.finish()
        Commit(self.chunks, complete, checksums).write(self._store, self._number)
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Close the files, whether committed or not."""
        for file, _ in self._files.values():
            file.close()

    def _append(self, ending: str, data: bytes) -> None:
        file, stream = self._files[ending]
        file.write(data)
        stream.update(data)


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open a file to append after its first ``size`` bytes; what follows them is cut off."""
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


class UnfinishedCache:
    """The unfinished cache of one output; for the main rank.

    Args:
        store: the output's, claimed; its recipe is the cache's ``producer.settings``.
        num_shards: pairs of files that the cache will have.
    """

    def __init__(self, store: WorkStore, num_shards: int) -> None:
        self._store = store
        self._num_shards = num_shards

    def commits(self) -> dict[int, Commit]:
        """Return the commit of every shard that is complete or can be continued; their bytes are read and compared.

        A shard whose bytes are not those committed is made again, and a line says so.
        """
        found = self._written_commits()
        with ThreadPoolExecutor(READING_THREADS) as pool:
            sound = dict(zip(found, pool.map(lambda commit: commit.holds(self._store.folder), found.values())))
        for number in (number for number in found if not sound[number]):
            logger.warning(f"{self._store.folder / shard_name(number)}: damaged; the shard is made again")
        return {number: commit for number, commit in found.items() if sound[number]}

    def finish(self, dataset: ChunkDataset, facts: Mapping[str, Any], producer: Mapping[str, Any]) -> None:
        """Write the manifest over complete shards and give the folder the output's name.

        Args:
            facts: manifest keys that are the cache's own: ``codec``, ``view``, ``teacher``.

        Raises:
            DataError: a shard is not complete; the output exists.
        """
        folder = self._store.folder
        commits = {number: commit for number, commit in self._written_commits().items() if commit.complete}
        missing = [number for number in range(self._num_shards) if number not in commits]
        if missing:
            raise DataError(
                f"{folder}: {len(missing)} of {self._num_shards} shards are not complete, the first is "
                f"{shard_name(missing[0])}; do all ranks see the same file system? run again to make them"
            )
        checksums = Checksums()
        for number in range(self._num_shards):
            checksums.files.update(commits[number].checksums.files)
            for name in commits[number].checksums.files:
                checksums.check_size(folder, name)
        if not dataset.is_root:
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(dataset.chunk_ids, dtype=np.int64))
            write_file(folder / CHUNK_IDS_NAME, buffer.getvalue())
            checksums.add_file(folder, CHUNK_IDS_NAME)
        write_manifest(folder, KIND, self._manifest(dataset, facts, producer, checksums), checksums)
        self._store.publish()

    def publish_if_whole(self) -> bool:
        """Give the folder the output's name if a kill struck between the manifest and the rename; return whether."""
        path = self._store.folder / MANIFEST_NAME
        if not path.is_file():
            return False
        if not self._is_whole():
            path.unlink()
            return False
        self._store.publish()
        return True

    def _is_whole(self) -> bool:
        """Whether the folder's manifest is one of this work, and describes the files that are there."""
        folder = self._store.folder
        try:
            manifest, checksums = read_manifest(folder, KIND)
            for name in checksums.files:
                checksums.check_size(folder, name)
        except DataError as error:
            logger.warning(f"{error}; the cache is continued from its commits")
            return False
        return manifest["producer"].get("settings") == self._store.recipe

    def _written_commits(self) -> dict[int, Commit]:
        found = {number: Commit.read(self._store, number) for number in range(self._num_shards)}
        return {number: commit for number, commit in found.items() if commit is not None}

    def _manifest(
        self, dataset: ChunkDataset, facts: Mapping[str, Any], producer: Mapping[str, Any], checksums: Checksums
    ) -> dict[str, Any]:
        names = [shard_name(number) for number in range(self._num_shards)]
        indices = [np.fromfile(self._store.folder / f"{name}.idx", INDEX_DTYPE) for name in names]
        record_bytes = sum(entry.size for name, entry in checksums.files.items() if name.endswith(".bin"))
        tokens = sum(int(index["tokens"].sum()) for index in indices)
        ids = sum(int(index["ids"].sum()) for index in indices)
        identity = {"dataset": dataset.fingerprint, "root": dataset.root_fingerprint, **facts}
        identity["teacher"] = facts["teacher"]["fingerprint"]
        return {
            "fingerprint": fingerprint_of(identity, checksums),
            "dataset": {
                "path": str(dataset.path),
                "fingerprint": dataset.fingerprint,
                "root_fingerprint": dataset.root_fingerprint,
                "tokenizer_hash": dataset.tokenizer_hash,
                "seq_length": dataset.seq_length,
                "num_chunks": dataset.num_chunks,
            },
            **facts,
            "tokens": tokens,
            "ids": ids,
            "ids_per_token": round(ids / max(1, tokens), 4),
            "bytes_per_token": round(record_bytes / max(1, tokens), 4),
            "shards": [{"name": name, "chunks": len(index)} for name, index in zip(names, indices)],
            "parents": [{"kind": "chunk_dataset", "path": str(dataset.path), "fingerprint": dataset.fingerprint}],
            "producer": dict(producer),
            "versions": versions(),
        }
