"""One pair of files of a cache, written so that a writer killed at any moment resumes where it last committed.

``knowledge-00000.bin`` holds records one after another, ``knowledge-00000.idx`` 28 bytes about each (``INDEX_DTYPE``).
While the cache is written, part ``knowledge-00000`` of the work store says how much of both is committed, with the
checksums of those bytes: it is replaced, whole, when they have reached the disk. What follows a commit is cut off.

Chunks through the teacher and into shards.

    chunks → teacher's forward pass → (last pipeline stage) ids of the codec → thread: records → shard files

Micro-batch m of a shard holds its chunks [m·b, (m + 1)·b) whatever the layout and wherever a killed run resumes, so the
same bytes come out. Encoding and writing run beside the next forward pass, at most ``MOST_WAITING`` micro-batches
behind.
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_kd.artefacts.checksums import BLOCK_BYTES, Checksums, ChecksumStream
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.checkpoints.weights import LoadedModel
from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.parallel.groups import is_last_stage
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.cache.cache_reader import INDEX_DTYPE, token_hash
from megatron_kd.teachers.cache.codec import Codec, Entries
from megatron_kd.teachers.cache.sparsifier import Sparsifier
from megatron_kd.teachers.routing import whole_sequence


def shard_name(number: int) -> str:
    """Name of a shard's files, without their ending; its commit has it too."""
    return f"knowledge-{number:05d}"


@dataclass(frozen=True)
class Commit:
    """How far a shard is: whole chunks, whether it is complete, and the checksums of the bytes that hold them."""

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
        """Whether the bytes that it counts are all there, and as they were."""
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
        store: of the cache under construction.
        number: of the shard.
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


MICRO_BATCHES_PER_SCHEDULE = 8
MOST_WAITING = 4
MOST_CHUNKS_PER_SHARD = 8192
SHARDS_OF_A_SMALL_DATASET = 16


@dataclass(frozen=True)
class ShardPlan:
    """Which chunks each shard holds; the same for every layout."""

    num_chunks: int
    chunks_per_shard: int

    @classmethod
    def of(cls, num_chunks: int, chunks_per_shard: int | None) -> "ShardPlan":
        """``None`` chooses shards small enough to be shared out among ranks."""
        if chunks_per_shard is None:
            chunks_per_shard = min(MOST_CHUNKS_PER_SHARD, max(1, -(-num_chunks // SHARDS_OF_A_SMALL_DATASET)))
        return cls(num_chunks, chunks_per_shard)

    @property
    def num_shards(self) -> int:
        """Pairs of files."""
        return -(-self.num_chunks // self.chunks_per_shard)

    def chunk_range(self, number: int) -> tuple[int, int]:
        """First chunk of a shard, and the one after its last."""
        first = number * self.chunks_per_shard
        return first, min(first + self.chunks_per_shard, self.num_chunks)


@dataclass(frozen=True)
class ChunkRows:
    """What is known of a micro-batch's chunks without the teacher: which positions count, and their identity."""

    present: list[np.ndarray]
    hashes: list[int]
    root_ids: np.ndarray

    @classmethod
    def of(cls, batch: Batch, lengths: np.ndarray, root_ids: np.ndarray) -> "ChunkRows":
        """Of a batch on the CPU whose first ``len(lengths)`` rows are chunks of ``lengths`` ids."""
        positions = [int(length) - 1 for length in lengths]
        return cls(
            present=[batch.loss_mask[row, :n].numpy() > 0 for row, n in enumerate(positions)],
            hashes=[token_hash(batch.tokens[row], batch.labels[row], n) for row, n in enumerate(positions)],
            root_ids=root_ids,
        )

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Root chunk id and place in the chunk of every position that counts, chunk after chunk."""
        places = [np.flatnonzero(present) for present in self.present]
        owners = np.repeat(self.root_ids, [len(place) for place in places])
        return owners, np.concatenate(places)

    def records(self, codec: Codec, entries: Entries) -> tuple[list[np.ndarray], np.ndarray]:
        """The record of every chunk, and the index of all (``end`` is the shard's to know)."""
        records, index = [], np.zeros(len(self.present), dtype=INDEX_DTYPE)
        ends = np.concatenate([[0], np.cumsum(entries.counts)])
        at = 0
        for row, present in enumerate(self.present):
            stop = at + int(present.sum())
            kept = slice(int(ends[at]), int(ends[stop]))
            records.append(codec.encode(present, entries.part(at, stop, kept)))
            index[row] = (self.hashes[row], 0, len(present), stop - at, kept.stop - kept.start)
            at = stop
        return records, index


class ShardFiller:
    """Fills shards with what one replica of a teacher says.

    Args:
        store: of the cache under construction.
        dataset: whose chunks.
        loaded: the teacher.
        codec, temperature: what is kept, and of which distribution.
        micro_batch_size: rows of a forward pass.
        commit_seconds: see ``ShardWriter``.
    """

    def __init__(
        self,
        store: WorkStore,
        dataset: ChunkDataset,
        loaded: LoadedModel,
        codec: Codec,
        temperature: float,
        micro_batch_size: int,
        commit_seconds: float,
        device: torch.device,
    ) -> None:
        self._store, self._dataset, self._loaded, self._codec = store, dataset, loaded, codec
        self._rows, self._commit_seconds, self._device = micro_batch_size, commit_seconds, device
        groups = loaded.groups
        self.replica_size = groups.mp.size()
        self._sparsifier = None
        if is_last_stage(groups):
            self._sparsifier = Sparsifier(codec, loaded.model_chunks[-1].output_head(), groups.tp, temperature)
        self._writes = self._sparsifier is not None and groups.tp.rank() == 0
        self._thread = ThreadPoolExecutor(1, "cache writer")
        self._waiting: deque[Future] = deque()

    def __enter__(self) -> "ShardFiller":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def shard(self, number: int, first: int, last: int, commit: Commit | None) -> Iterator[int]:
        """Write the chunks ``[first, last)`` of a shard, from its commit on; yields chunks as they are done."""
        writer = ShardWriter(self._store, number, commit, self._commit_seconds) if self._writes else None
        start = first + (commit.chunks if commit else 0)
        try:
            for window in range(start, last, self._rows * MICRO_BATCHES_PER_SCHEDULE):
                stop = min(last, window + self._rows * MICRO_BATCHES_PER_SCHEDULE)
                self._window(range(window, stop, self._rows), last, writer)
                yield stop - window
            if writer is not None:
                self._finish_writing()
                writer.commit(complete=True)
        finally:
            if writer is not None:
                writer.close()

    def _window(self, starts: range, last: int, writer: ShardWriter | None) -> None:
        items = [self._read(start, min(start + self._rows, last)) for start in starts]
        forward_only(
            self._loaded.model_chunks,
            self._loaded.groups,
            lambda item: (item[0].tokens, item[0].position_ids),
            lambda item, hidden: self._collect(item[1], item[2], hidden, writer),
            items,
            seq_length=self._dataset.seq_length,
            micro_batch_size=self._rows,
        )

    def _read(self, start: int, stop: int) -> tuple[Batch, ChunkRows, Tensor]:
        """A micro-batch, filled up with copies of its last chunk; the mask [b, s] of the positions that count."""
        indices = np.minimum(np.arange(start, start + self._rows), stop - 1)
        batch = make_batch(self._dataset, indices, self._dataset.seq_length)
        rows = ChunkRows.of(batch, self._dataset.lengths[start:stop], self._dataset.root_ids(np.arange(start, stop)))
        counted = batch.loss_mask > 0
        counted[stop - start :] = False
        return batch.to(self._device), rows, counted.to(self._device)

    def _collect(self, rows: ChunkRows, counted: Tensor, hidden: Tensor, writer: ShardWriter | None) -> None:
        assert self._sparsifier is not None
        hidden = whole_sequence(hidden, self._loaded.model_chunks[-1], self._loaded.groups)
        entries = self._sparsifier(hidden.transpose(0, 1)[counted], *rows.tokens())
        if writer is not None:
            while len(self._waiting) >= MOST_WAITING:
                self._waiting.popleft().result()
            self._waiting.append(self._thread.submit(self._write, writer, rows, entries))

    def _write(self, writer: ShardWriter, rows: ChunkRows, entries: Entries) -> None:
        writer.add(*rows.records(self._codec, entries))

    def _finish_writing(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()
