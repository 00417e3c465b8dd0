"""Copy chunks of one dataset into another, in parallel: contiguous byte ranges, nothing is decoded.

    output shard → segments of 16 MiB, one task each:
        input blocks verified → runs of neighbouring chunks gathered → block checksums → written at its own offset

Tasks do not wait for each other, and their output depends on the chunks alone. Checksums, copies and writes release
Python's lock, so threads are enough.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_kd.artefacts.checksums import BLOCK_BYTES, ChecksumStream, FileChecksums, as_bytes
from megatron_kd.data.chunk_dataset import PROMPT_LENGTHS_NAME, ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.indexed_dataset import write_index
from megatron_kd.data.workers import cpu_count
from megatron_kd.logs import progress_bar

SEGMENT_BYTES = 16 * BLOCK_BYTES
MAX_THREADS = 16


def copy_chunks(dataset: ChunkDataset, kept: np.ndarray, writer: ChunkDatasetWriter, threads: int = 0) -> None:
    """Append chunks of a dataset, with their prompt lengths and domains, to an empty ``writer``.

    Args:
        dataset: the source; what is read is verified against its checksums.
        kept: chunk indices, ascending.
        writer: takes over the dtype of the dataset, which may be wider than its vocabulary needs.
        threads: 0 for one per core, at most 16.

    Raises:
        DataError: a block of the dataset is damaged.
    """
    writer.dtype = dataset.dtype
    per_shard = writer.chunks_per_shard
    threads = threads or min(MAX_THREADS, cpu_count())
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar(len(kept), "copy", "chunk") as bar,
    ):
        for start in range(0, len(kept), per_shard):
            shard = _Shard.of(dataset, kept[start : start + per_shard])
            files = _copy_shard(dataset, shard, writer.next_shard_prefix(), pool)
            writer.add_shard(files, len(shard.lengths), int(shard.lengths.sum(dtype=np.int64)))
            bar.update(len(shard.lengths))
    if dataset.prompt_lengths is not None:
        writer.add_array(PROMPT_LENGTHS_NAME, dataset.prompt_lengths[kept])
        writer.mask_prompts = dataset.masks_prompts
    if dataset.domains is not None:
        writer.add_domains(dataset.domain_names, dataset.domains[kept])


@dataclass(frozen=True)
class _Shard:
    """One output shard: where its chunks come from, and where they go.

    Attributes:
        owners: input shard of each chunk, int32.
        sources, targets: byte offset of each chunk in the input and in the output shard, int64.
        lengths: ids of each chunk, int32.
        itemsize: bytes of an id.
    """

    owners: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    itemsize: int

    @classmethod
    def of(cls, dataset: ChunkDataset, kept: np.ndarray) -> "_Shard":
        firsts = np.cumsum([0] + [len(shard) for shard in dataset.shards])
        bounds = np.searchsorted(kept, firsts)
        parts = [
            (number, shard, kept[bounds[number] : bounds[number + 1]] - firsts[number])
            for number, shard in enumerate(dataset.shards)
            if bounds[number] < bounds[number + 1]
        ]
        lengths = np.concatenate([shard.lengths[local] for _, shard, local in parts])
        ends = np.cumsum(lengths, dtype=np.int64) * dataset.dtype.itemsize
        return cls(
            np.concatenate([np.full(len(local), number, dtype=np.int32) for number, _, local in parts]),
            np.concatenate([shard.pointers[local] for _, shard, local in parts]),
            np.concatenate([[0], ends[:-1]]),
            lengths,
            dataset.dtype.itemsize,
        )

    @property
    def num_bytes(self) -> int:
        return int(self.targets[-1]) + int(self.lengths[-1]) * self.itemsize

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (input shard, first bytes, last bytes) of the runs that make up output bytes [start, stop)."""
        first = int(np.searchsorted(self.targets, start, side="right")) - 1
        last = int(np.searchsorted(self.targets, stop, side="left"))
        owners, begins = self.owners[first:last], self.sources[first:last].copy()
        ends = begins + self.lengths[first:last].astype(np.int64) * self.itemsize
        begins[0] += start - int(self.targets[first])
        ends[-1] -= max(0, int(self.targets[last - 1]) + int(self.lengths[last - 1]) * self.itemsize - stop)
        breaks = np.flatnonzero((begins[1:] != ends[:-1]) | (owners[1:] != owners[:-1])) + 1
        opening, closing = np.concatenate([[0], breaks]), np.concatenate([breaks - 1, [len(owners) - 1]])
        for owner in np.unique(owners).tolist():
            mine = owners[opening] == owner
            yield owner, begins[opening[mine]], ends[closing[mine]]


def _copy_shard(
    dataset: ChunkDataset, shard: _Shard, prefix: Path, pool: ThreadPoolExecutor
) -> dict[str, FileChecksums]:
    """Write ``prefix``.bin and .idx, and return their checksums by file name."""
    bin_path, index_path = prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")
    descriptor = os.open(bin_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    futures: list[Future[np.ndarray]] = []
    try:
        size = shard.num_bytes
        futures = [
            pool.submit(_copy_segment, dataset, shard, start, min(start + SEGMENT_BYTES, size), descriptor)
            for start in range(0, size, SEGMENT_BYTES)
        ]
        index = write_index(index_path, shard.lengths, dataset.dtype)
        blocks = np.concatenate([future.result() for future in futures])
    finally:
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()  # wait: it writes to the descriptor
        os.close(descriptor)
    return {bin_path.name: FileChecksums(size, blocks), index_path.name: index}


def _copy_segment(dataset: ChunkDataset, shard: _Shard, start: int, stop: int, descriptor: int) -> np.ndarray:
    """Gather, checksum and write output bytes [start, stop), and return the CRC-32 of their blocks."""
    pieces: list[np.ndarray] = []
    for owner, begins, ends in shard.runs(start, stop):
        pieces += dataset.verified_ranges(owner, begins, ends)
    data = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    checksums = ChecksumStream()
    checksums.update(data)
    view, offset = as_bytes(data), start
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return checksums.finish().blocks
