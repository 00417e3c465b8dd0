"""A chunk dataset: a folder with ``manifest.json`` and shards ``chunks-00000.bin/.idx``, …, of chunks of token ids.

A chunk is a training instance of at most ``seq_length + 1`` ids. Its identity is (root fingerprint, root chunk id): a
dataset selected from another keeps the id that each chunk has in the root (``chunk_ids.npy``), so that what was
computed for the root serves the selection. See ``docs/file_formats.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.checksums import Checksums, LazyBlocks
from megatron_kd.artefacts.manifest import open_artefact
from megatron_kd.data.chunk_order import ChunkOrder
from megatron_kd.data.indexed_dataset import IndexedDatasetReader
from megatron_kd.errors import DataError

KIND = "chunk_dataset"
CHUNK_IDS_NAME = "chunk_ids.npy"
TOKEN_BYTES_NAME = "token_byte_lengths.npy"
PROMPT_LENGTHS_NAME = "prompt_lengths.npy"
DOMAINS_NAME = "domains.npy"
MASK_RULE = "input_is_not_pad"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class TokenizerInfo:
    """What a dataset records of its tokenizer; free of tokenizer libraries, so that training needs none.

    Attributes:
        hash: content hash (``data/tokenization.py``).
        vocab_size: largest id + 1.
        eos_id: ends a document.
        pad_id: fills short rows on the right; equal to ``eos_id``, as in the Qwen, Llama 3.1 and Mamba recipes, so that
            the loss mask leaves out positions whose input is eos (``data/batch.py``).
        token_byte_lengths: UTF-8 bytes per id, int32 ``[vocab_size]``, 0 for special tokens.
        files: name → contents of the files that make it up; empty for synthetic data.
    """

    hash: str
    vocab_size: int
    eos_id: int
    pad_id: int
    token_byte_lengths: np.ndarray
    files: Mapping[str, bytes] = field(default_factory=dict)

    def copy_files(self, dataset_folder: Path) -> list[str]:
        """Write its files into ``<dataset_folder>/tokenizer/``, and return their names relative to the dataset."""
        if not self.files:
            return []
        (dataset_folder / TOKENIZER_FOLDER).mkdir()
        for name, contents in self.files.items():
            (dataset_folder / TOKENIZER_FOLDER / name).write_bytes(contents)
        return [f"{TOKENIZER_FOLDER}/{name}" for name in self.files]


class ChunkDataset:
    """Reads a chunk dataset; made by :meth:`open`.

    Attributes:
        path: the folder.
        manifest: its manifest.
        num_chunks, num_tokens: totals over the shards.
        seq_length: a chunk has at most ``seq_length + 1`` ids.
        vocab_size, eos_id, pad_id: of the tokenizer.
        tokenizer_hash, tokenizer_path: content hash of the tokenizer, and the copy of its files (may be absent).
        fingerprint, root_fingerprint: content identity of this dataset and of the one its chunk ids refer to.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], checksums: Checksums) -> None:
        self.path = path
        self.manifest = manifest
        self.checksums = checksums
        self.num_chunks: int = manifest["num_chunks"]
        self.num_tokens: int = manifest["num_tokens"]
        self.seq_length: int = manifest["seq_length"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.pad_id: int = manifest["pad_id"]
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self.tokenizer_path = path / TOKENIZER_FOLDER
        self.fingerprint: str = manifest["fingerprint"]
        self.root_fingerprint: str = manifest["root_fingerprint"]
        self.dtype = np.dtype(manifest["dtype"])
        self.shards = [self._open_shard(shard) for shard in manifest["shards"]]
        self._blocks = [
            LazyBlocks(shard.bin_path, shard.buffer, checksums[shard.bin_path.name]) for shard in self.shards
        ]
        self._starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    @classmethod
    def open(cls, path: str | Path) -> "ChunkDataset":
        """Open a dataset: manifest, sidecar and indices are verified now, ids block by block at first touch.

        Raises:
            DataError: it is missing, damaged, or something else.
        """
        return cls(Path(path), *open_artefact(path, KIND))

    def _open_shard(self, entry: dict[str, Any]) -> IndexedDatasetReader:
        reader = IndexedDatasetReader(self.path / entry["name"], entry.get("unused_bytes", 0))
        if len(reader) != entry["chunks"] or reader.dtype != self.dtype:
            raise DataError(
                f"{reader.index_path}: {len(reader)} chunks of {reader.dtype} where the manifest states "
                f"{entry['chunks']} of {self.dtype}; the files are of different datasets"
            )
        return reader

    def __len__(self) -> int:
        return self.num_chunks

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the ids of one chunk, int64 ``[length]``.

        Raises:
            IndexError: ``index`` is not in ``[0, num_chunks)``.
            DataError: a block on disk is damaged.
        """
        if not 0 <= index < self.num_chunks:
            raise IndexError(f"chunk {index} of a dataset with {self.num_chunks} chunks ({self.path})")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._view(shard, int(index - self._starts[shard])).astype(np.int64)

    def _view(self, shard: int, index: int) -> np.ndarray:
        reader = self.shards[shard]
        start, stop = reader.byte_range(index)
        self._blocks[shard].touch(start, stop)
        return reader.buffer[start:stop].view(self.dtype)

    def verified_ranges(self, shard: int, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
        """Return byte ranges of one shard's ``.bin``, uint8 views; every block from first to last is verified.

        Args:
            shard: number of the shard.
            starts, stops: int64 ``[n]``, ascending, n at least 1.

        Raises:
            DataError: a block on disk is damaged.
        """
        self._blocks[shard].touch(int(starts[0]), int(stops[-1]))
        buffer = self.shards[shard].buffer
        return [buffer[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]

    def gather(self, indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return chunks as the rows of a matrix, right-padded with ``pad_id``.

        Args:
            indices: ``[n]`` chunk indices.
            width: columns; every chunk must fit.

        Returns:
            ids int64 ``[n, width]`` and lengths int64 ``[n]``.

        Raises:
            DataError: a chunk is longer than ``width``, or damaged on disk.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= self.num_chunks):
            raise IndexError(f"chunks {indices.min()}…{indices.max()} of {self.num_chunks} ({self.path})")
        ids = np.full((len(indices), width), self.pad_id, dtype=np.int64)
        lengths = np.zeros(len(indices), dtype=np.int64)
        owners = np.searchsorted(self._starts, indices, side="right") - 1
        local = indices - self._starts[owners]
        for row, (shard, index) in enumerate(zip(owners.tolist(), local.tolist(), strict=True)):
            chunk = self._view(shard, index)
            if len(chunk) > width:
                raise DataError(
                    f"{self.path}: chunk {indices[row]} has {len(chunk)} ids, more than {width}; "
                    f"set data.seq_length to the dataset's {self.seq_length}"
                )
            ids[row, : len(chunk)] = chunk
            lengths[row] = len(chunk)
        return ids, lengths

    def order(self, seed: int, shuffle: bool) -> ChunkOrder:
        """Return the order in which training sees the chunks."""
        return ChunkOrder(self.num_chunks, seed, shuffle)

    def has_unmasked_position(self, index: int) -> bool:
        """Whether any position of a chunk counts in a loss: its input is real and not pad (``MASK_RULE``).

        Where ``masks_prompts``, positions whose label belongs to the prompt do not count either.
        """
        prompt = int(self.prompt_lengths[index]) if self.masks_prompts and self.prompt_lengths is not None else 0
        return bool((self[index][max(prompt - 1, 0) : -1] != self.pad_id).any())

    @property
    def masks_prompts(self) -> bool:
        """Whether prompts are left out of every loss and score of this dataset, not only on request."""
        return bool(self.manifest.get("mask_prompts", False))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Ids per chunk, int32 ``[num_chunks]``."""
        parts = [shard.lengths for shard in self.shards]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def lengths_between(self, start: int, stop: int) -> np.ndarray:
        """Return the lengths of the chunks in ``[start, stop)``, int32, reading only the indices of their shards."""
        parts = [
            shard.lengths[max(0, start - first) : max(0, stop - first)]
            for shard, first in zip(self.shards, self._starts.tolist(), strict=False)
            if first < stop and start < first + len(shard)
        ]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    @cached_property
    def chunk_ids(self) -> np.ndarray:
        """Id of each chunk in the root dataset, int64 ``[num_chunks]``."""
        if self.is_root:
            return np.arange(self.num_chunks, dtype=np.int64)
        return np.load(self.path / CHUNK_IDS_NAME, mmap_mode="r")

    def root_ids(self, indices: np.ndarray) -> np.ndarray:
        """Return the ids that some chunks have in the root dataset, int64 ``[n]``."""
        indices = np.asarray(indices, dtype=np.int64)
        return indices if self.is_root else np.asarray(self.chunk_ids[indices])

    @property
    def is_root(self) -> bool:
        """Whether chunks are identified by their position in this dataset."""
        return CHUNK_IDS_NAME not in self.checksums.files

    @cached_property
    def prompt_lengths(self) -> np.ndarray | None:
        """Ids of each chunk's prompt, int32 ``[num_chunks]``; None in a dataset without prompts."""
        if PROMPT_LENGTHS_NAME not in self.checksums.files:
            return None
        return np.load(self.path / PROMPT_LENGTHS_NAME, mmap_mode="r")

    @property
    def domain_names(self) -> list[str]:
        """Labels of the domains; empty if the corpus names none."""
        return list(self.manifest.get("domains", []))

    @cached_property
    def domains(self) -> np.ndarray | None:
        """Domain of each chunk, a number in ``domain_names``, uint16 ``[num_chunks]``; None without domains."""
        if DOMAINS_NAME not in self.checksums.files:
            return None
        return np.load(self.path / DOMAINS_NAME, mmap_mode="r")

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 ``[vocab_size]``; 0 for special tokens."""
        return np.load(self.path / TOKEN_BYTES_NAME)

    def verify(self, on_bytes: Any = None) -> None:
        """Read every file and compare every checksum.

        Raises:
            DataError: something differs.
        """
        for name in self.checksums.files:
            self.checksums.verify_file(self.path, name, on_bytes)

    def tokenizer_info(self) -> TokenizerInfo:
        """Return the tokenizer, as a writer of a derived dataset needs it."""
        prefix = f"{TOKENIZER_FOLDER}/"
        names = [name.removeprefix(prefix) for name in self.checksums.files if name.startswith(prefix)]
        files = {name: (self.tokenizer_path / name).read_bytes() for name in names}
        return TokenizerInfo(
            self.tokenizer_hash, self.vocab_size, self.eos_id, self.pad_id, self.token_byte_lengths, files
        )
