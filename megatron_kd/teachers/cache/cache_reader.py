"""Random access to the records of a teacher cache, found by the identity of a chunk.

A chunk is (fingerprint of the root dataset, id in it), so a cache serves the dataset that it was made from, every
selection from it, and any order. Records are memory-mapped, their blocks verified at first touch. Format:
``docs/file_formats.md``.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Mapping

import numpy as np
from torch import Tensor

from megatron_kd.artefacts.checksums import Checksums, LazyBlocks
from megatron_kd.artefacts.manifest import open_artefact
from megatron_kd.data.chunk_dataset import MASK_RULE, ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.teachers.cache.codec import Codec, DecodedChunk

KIND = "logit_cache"
CHUNK_IDS_NAME = "chunk_ids.npy"
INDEX_DTYPE = np.dtype([("token_hash", "<u8"), ("end", "<u8"), ("positions", "<u4"), ("tokens", "<u4"), ("ids", "<u4")])
"""Index entry of a chunk: hash of its ids, end of its record, positions, those that are present, ids kept."""


@dataclass(frozen=True)
class View:
    """How the teacher saw the chunks, and how its distribution was computed."""

    temperature: float
    compute_dtype: str
    mask_rule: str = MASK_RULE
    reset_attention_mask: bool = False
    """Whether documents inside a chunk were kept apart; False means cross-document attention."""
    reset_position_ids: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "View":
        """Invert :meth:`to_mapping`."""
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for a manifest."""
        return asdict(self)

    def check(self, needed: "View", where: str) -> None:
        """Check that a cache made with this view serves a run with the view ``needed``.

        Raises:
            DataError: names every value that differs.
        """
        own, other = self.to_mapping(), needed.to_mapping()
        differences = [
            f"{name} {own[name]} where this run has {other[name]}" for name in own if own[name] != other[name]
        ]
        if differences:
            raise DataError(
                f"{where}: was cached with {', '.join(differences)}; cache the teacher again or change the run"
            )


def token_hash(inputs: Tensor, labels: Tensor, positions: int) -> int:
    """Return a 64-bit hash of a chunk's ``positions + 1`` ids, from the rows [s] that a batch makes of it."""
    ids = np.empty(positions + 1, dtype="<i4")
    ids[:positions] = inputs[:positions].numpy()
    if positions:
        ids[positions] = int(labels[positions - 1])
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


class LogitCache:
    """A teacher cache on disk, opened with :meth:`open`.

    Attributes:
        path: the folder.
        manifest: its manifest.
        codec: how records are encoded.
        view: how the teacher saw the chunks.
        num_chunks: number of records.
        root_fingerprint: identity of the dataset that chunk ids refer to.
        fingerprint, teacher_fingerprint: identity of the cache's content, and of the weights that made it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], checksums: Checksums) -> None:
        self.path, self.manifest, self._checksums = path, manifest, checksums
        self.codec = Codec.from_mapping(manifest["codec"])
        self.view = View.from_mapping(manifest["view"])
        self.num_chunks: int = manifest["dataset"]["num_chunks"]
        self.root_fingerprint: str = manifest["dataset"]["root_fingerprint"]
        self.fingerprint: str = manifest["fingerprint"]
        self.teacher_fingerprint: str = manifest["teacher"]["fingerprint"]
        self._starts = np.cumsum([0] + [shard["chunks"] for shard in manifest["shards"]])
        self._shards: dict[int, tuple[np.ndarray, np.ndarray, LazyBlocks]] = {}
        if self._starts[-1] != self.num_chunks:
            raise DataError(f"{path}: its shards hold {self._starts[-1]} chunks, its manifest states {self.num_chunks}")

    @classmethod
    def open(cls, path: str | Path) -> "LogitCache":
        """Open a cache; manifest, sidecar and indices are verified now, records block by block at first touch.

        Raises:
            DataError: it is missing, damaged, or something else.
        """
        return cls(Path(path), *open_artefact(path, KIND))

    def check_covers(self, dataset: ChunkDataset) -> None:
        """Check that every chunk of a dataset is here.

        Raises:
            DataError: the dataset has another root (names both fingerprints), or chunks that were not cached.
        """
        made_from = self.manifest["dataset"]
        if dataset.root_fingerprint != self.root_fingerprint:
            raise DataError(
                f"{self.path}: was cached from chunks of the dataset {self.root_fingerprint} ({made_from['path']}), "
                f"but {dataset.path} has chunks of {dataset.root_fingerprint}; cache the teacher on that dataset"
            )
        if dataset.tokenizer_hash != made_from["tokenizer_hash"]:
            raise DataError(
                f"{self.path}: has tokenizer {made_from['tokenizer_hash']}, {dataset.path} has "
                f"{dataset.tokenizer_hash}: cache the teacher on that dataset"
            )
        missing = int((self._places(dataset.chunk_ids) < 0).sum())
        if missing:
            raise DataError(
                f"{self.path}: lacks {missing} of the {dataset.num_chunks} chunks of {dataset.path}; it was made from "
                f"the part {made_from['fingerprint']} of their root: cache the teacher on the root or on this dataset"
            )

    def rows(self, root_ids: np.ndarray) -> np.ndarray:
        """Return the records, int64, of chunks with these ids in the root dataset; every id must be here."""
        return self._places(root_ids)

    def index(self, row: int) -> np.void:
        """Return the index entry of one record, see ``INDEX_DTYPE``."""
        shard, local = self._locate(row)
        return self._shard(shard)[0][local]

    def read(self, row: int) -> DecodedChunk:
        """Decode the record of one chunk.

        Raises:
            DataError: its block on disk is damaged.
        """
        shard, local = self._locate(row)
        index, records, blocks = self._shard(shard)
        start, entry = (int(index["end"][local - 1]) if local else 0), index[local]
        stop = int(entry["end"])
        blocks.touch(start, stop)
        return self.codec.decode(records[start:stop], int(entry["positions"]), int(entry["ids"]))

    def verify(self, on_bytes: Any = None) -> None:
        """Read every file and compare every checksum.

        Raises:
            DataError: something differs.
        """
        for name in self._checksums.files:
            self._checksums.verify_file(self.path, name, on_bytes)

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self.num_chunks:
            raise IndexError(f"record {row} of a cache with {self.num_chunks} ({self.path})")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, int(row - self._starts[shard])

    def _shard(self, number: int) -> tuple[np.ndarray, np.ndarray, LazyBlocks]:
        if number not in self._shards:
            name = self.manifest["shards"][number]["name"]
            bin_path = self.path / f"{name}.bin"
            index = np.memmap(self.path / f"{name}.idx", dtype=INDEX_DTYPE, mode="r")
            is_empty = bin_path.stat().st_size == 0
            records = np.zeros(0, np.uint8) if is_empty else np.memmap(bin_path, dtype=np.uint8, mode="r")
            blocks = LazyBlocks(bin_path, np.asarray(records), self._checksums[bin_path.name])
            self._shards[number] = np.asarray(index), np.asarray(records), blocks
        return self._shards[number]

    def _places(self, root_ids: np.ndarray) -> np.ndarray:
        """Return the records of root ids, -1 where there is none."""
        root_ids = np.asarray(root_ids, dtype=np.int64)
        if self._own_ids is None:
            return np.where(root_ids < self.num_chunks, root_ids, -1)
        order, ids = self._own_ids
        at = np.minimum(np.searchsorted(ids, root_ids), len(ids) - 1)
        return np.where(ids[at] == root_ids, order[at], -1)

    @cached_property
    def _own_ids(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Records and root ids, ordered by root id; None where a record's number is its root id."""
        if CHUNK_IDS_NAME not in self._checksums.files:
            return None
        ids = np.load(self.path / CHUNK_IDS_NAME)
        order = np.argsort(ids, kind="stable")
        return order, ids[order]
