"""A seeded shuffle of any number of chunks in bounded memory.

The order is that of a 64-bit key, a bijective function of (seed, chunk number), so it depends on nothing else. While
chunks arrive they are appended to the bucket that the key's top bits name; at the end each bucket is read whole, sorted
by key and written out. Every byte is written and read twice, in sequence.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from megatron_kd.data.chunk_dataset import ChunkDatasetWriter
from megatron_kd.data.mixing import mix64, mix_int

BUCKET_BYTES = 128 << 20
MAX_BUCKET_BITS = 9
_RECORD = np.dtype([("key", "<u8"), ("length", "<i4")])


def bucket_bits_for(expected_bytes: int) -> int:
    """How many top bits of the key name the bucket, so that one bucket is about ``BUCKET_BYTES``."""
    return min(MAX_BUCKET_BITS, max(0, (expected_bytes // BUCKET_BYTES).bit_length()))


class ShuffleSpool:
    """Collects chunks in bucket files and hands them on in shuffled order.

    Args:
        folder: where the bucket files go; they are removed as they are read.
        dtype: of the ids.
        seed: of the order.
        bucket_bits: 2 to this power buckets; changes memory use, never the order.
    """

    def __init__(self, folder: Path, dtype: np.dtype, seed: int, bucket_bits: int) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._seed = np.uint64(mix_int(seed))
        self._bits = bucket_bits
        self._count = 0
        self._files = [
            (open(folder / f"bucket-{number:03d}.ids", "wb"), open(folder / f"bucket-{number:03d}.records", "wb"))
            for number in range(1 << bucket_bits)
        ]

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append chunks: ``ids`` ``[sum(lengths)]`` one after another, ``lengths`` ``[n]``."""
        numbers = np.arange(self._count, self._count + len(lengths), dtype=np.uint64)
        self._count += len(lengths)
        records = np.empty(len(lengths), dtype=_RECORD)
        records["key"] = mix64(numbers ^ self._seed)
        records["length"] = lengths
        ids = np.ascontiguousarray(ids, dtype=self._dtype)
        if self._bits == 0:
            self._append(0, ids, records)
            return
        buckets = records["key"] >> np.uint64(64 - self._bits)
        stops = np.cumsum(lengths)
        for bucket in np.unique(buckets).tolist():
            members = np.flatnonzero(buckets == bucket)
            parts = [ids[stops[index] - lengths[index] : stops[index]] for index in members]
            self._append(bucket, np.concatenate(parts), records[members])

    def _append(self, bucket: int, ids: np.ndarray, records: np.ndarray) -> None:
        id_file, record_file = self._files[bucket]
        id_file.write(memoryview(ids).cast("B") if len(ids) else b"")
        record_file.write(records.tobytes())

    def close(self) -> None:
        """Close what is open, whether drained or given up."""
        for file in (file for pair in self._files for file in pair):
            with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
                file.close()

    def drain(self, writer: ChunkDatasetWriter) -> None:
        """Write all chunks to ``writer`` in shuffled order and remove the bucket files."""
        for id_file, record_file in self._files:
            id_file.close()
            record_file.close()
            ids = np.fromfile(id_file.name, dtype=self._dtype)
            records = np.fromfile(record_file.name, dtype=_RECORD)
            order = np.argsort(records["key"])
            lengths = records["length"].astype(np.int64)
            stops = np.cumsum(lengths)
            parts = [ids[stops[index] - lengths[index] : stops[index]] for index in order]
            if parts:
                writer.add(np.concatenate(parts), lengths[order])
            os.unlink(id_file.name)
            os.unlink(record_file.name)
