"""A seeded shuffle of any number of chunks in bounded memory.

The order is that of a 64-bit key, a bijective function of (seed, chunk number), and depends on nothing else. Chunks are
appended to the bucket that the top bits of their key name; at the end each bucket is read whole, sorted by key and
yielded. Every byte is written and read twice. Up to ``PENDING_BYTES`` wait for their buckets in memory, and a bucket's
file is open only while it is written, so there can be thousands of buckets.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_kd.artefacts.checksums import as_bytes
from megatron_kd.data.chunking import Chunks
from megatron_kd.data.random_numbers import hash64, hash_int

BUCKET_BYTES = 128 << 20
MAX_BUCKET_BITS = 14
PENDING_BYTES = 256 << 20
_NONE = -1
_RECORD = np.dtype([("key", "<u8"), ("length", "<i4"), ("domain", "<i4"), ("prompt", "<i4")])


def bucket_bits_for(expected_bytes: int) -> int:
    """Return how many top bits of the key name the bucket, so that a bucket has about ``BUCKET_BYTES``."""
    return min(MAX_BUCKET_BITS, max(0, (expected_bytes // BUCKET_BYTES).bit_length()))


class ExternalShuffle:
    """Collects chunks in bucket files and yields them in shuffled order.

    Args:
        folder: where the bucket files go; they are removed as they are read.
        dtype: of the ids.
        seed: of the order.
        bucket_bits: there are 2 to this power buckets; changes memory use, never the order.
    """

    def __init__(self, folder: Path, dtype: np.dtype, seed: int, bucket_bits: int) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._seed = np.uint64(hash_int(seed))
        self._bits = bucket_bits
        self._count = 0
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending_bytes = 0

    def add(self, chunks: Chunks) -> None:
        """Append chunks."""
        lengths = chunks.lengths
        numbers = np.arange(self._count, self._count + len(lengths), dtype=np.uint64)
        self._count += len(lengths)
        records = np.empty(len(lengths), dtype=_RECORD)
        records["key"] = hash64(numbers ^ self._seed)
        records["length"] = lengths
        records["domain"] = _NONE if chunks.domains is None else chunks.domains
        records["prompt"] = _NONE if chunks.prompt_lengths is None else chunks.prompt_lengths
        ids = np.array(chunks.ids, dtype=self._dtype)
        self._pending.append((ids, records))
        self._pending_bytes += ids.nbytes + records.nbytes
        if self._pending_bytes >= PENDING_BYTES:
            self._spill()

    def _spill(self) -> None:
        """Append what is pending to the buckets' files, in order."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if not pending:
            return
        records = np.concatenate([records for _, records in pending])
        ids = np.concatenate([ids for ids, _ in pending])
        del pending
        buckets = (records["key"] >> np.uint64(64 - self._bits)) if self._bits else np.zeros(len(records), np.uint64)
        order = np.argsort(buckets, kind="stable")
        firsts = np.flatnonzero(np.diff(buckets[order], prepend=np.uint64(1 << 63)))
        starts = np.cumsum(records["length"], dtype=np.int64) - records["length"]
        for members in np.split(order, firsts[1:]):
            bucket = int(buckets[members[0]])
            self._append(bucket, ".ids", _gather(ids, starts[members], records["length"][members]))
            self._append(bucket, ".records", records[members])

    def _append(self, bucket: int, extension: str, data: np.ndarray) -> None:
        with open(self._path(bucket, extension), "ab") as file:
            if data.nbytes:
                file.write(as_bytes(data))

    def _path(self, bucket: int, extension: str) -> Path:
        return self._folder / f"bucket-{bucket:05d}{extension}"

    def drain(self) -> Iterator[Chunks]:
        """Yield all chunks in shuffled order; the bucket files are removed as they are read."""
        self._spill()
        for bucket in range(1 << self._bits):
            id_path, record_path = self._path(bucket, ".ids"), self._path(bucket, ".records")
            if not record_path.exists():
                continue
            ids = np.fromfile(id_path, dtype=self._dtype)
            records = np.fromfile(record_path, dtype=_RECORD)
            order = np.argsort(records["key"])
            lengths = records["length"].astype(np.int64)
            starts = np.cumsum(lengths) - lengths
            domains, prompts = records["domain"][order], records["prompt"][order]
            yield Chunks(
                _gather(ids, starts[order], lengths[order]),
                lengths[order],
                None if domains[0] == _NONE else domains.astype(np.uint16),
                None if prompts[0] == _NONE else prompts,
            )
            id_path.unlink()
            record_path.unlink()


def _gather(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the pieces ``ids[start : start + length]`` one after another."""
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    parts = [ids[start : start + length] for start, length in pairs]
    return np.concatenate(parts) if parts else ids[:0]
