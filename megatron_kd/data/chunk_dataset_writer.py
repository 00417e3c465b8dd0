"""Write chunk datasets: shards as chunks arrive, then arrays beside them, the tokenizer's files and the manifest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import write_array
from megatron_kd.artefacts.checksums import Checksums, FileChecksums
from megatron_kd.artefacts.manifest import fingerprint_of, versions, write_manifest
from megatron_kd.data.chunk_dataset import (
    CHUNK_IDS_NAME,
    DOMAINS_NAME,
    KIND,
    TOKEN_BYTES_NAME,
    TokenizerInfo,
)
from megatron_kd.data.indexed_dataset import IndexedDatasetWriter, dtype_for_vocab

DEFAULT_CHUNKS_PER_SHARD = 1_000_000


class ChunkDatasetWriter:
    """Writes the files of a chunk dataset into a folder that ``artefact_folder.building`` handed out.

    Args:
        folder: where.
        tokenizer: of the ids.
        seq_length: chunks have at most ``seq_length + 1`` ids.
        chunks_per_shard: a new ``.bin``/``.idx`` pair is begun after this many.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: TokenizerInfo,
        seq_length: int,
        chunks_per_shard: int = DEFAULT_CHUNKS_PER_SHARD,
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.seq_length = seq_length
        self.dtype = dtype_for_vocab(tokenizer.vocab_size)
        self.chunks_per_shard = chunks_per_shard
        self._shard: IndexedDatasetWriter | None = None
        self._shards: list[dict[str, Any]] = []
        self._checksums = Checksums()
        self._extra_files: list[str] = []
        self._domain_names: list[str] = []
        self.mask_prompts = False
        """Set to leave prompts out of every loss and score."""
        self.num_chunks = 0
        self.num_tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append chunks: ``ids`` ``[sum(lengths)]`` one after another, ``lengths`` ``[n]``."""
        ids = np.asarray(ids)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.tokenizer.vocab_size):
            raise ValueError(f"ids {ids.min()}…{ids.max()} outside a vocabulary of {self.tokenizer.vocab_size}")
        self.add_bytes(np.ascontiguousarray(ids, dtype=self.dtype).view(np.uint8), lengths)

    def add_bytes(self, data: np.ndarray, lengths: np.ndarray) -> None:
        """Append chunks whose ids are already bytes of ``dtype``: uint8 ``[sum(lengths) * itemsize]``."""
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= self.seq_length + 1:
            raise ValueError(f"chunk lengths {lengths.min()}…{lengths.max()} outside 1…{self.seq_length + 1}")
        while len(lengths):
            shard = self._open_shard()
            taken = lengths[: self.chunks_per_shard - shard.num_chunks]
            size = int(taken.sum()) * self.dtype.itemsize
            shard.add_bytes(data[:size], taken)
            self.num_chunks += len(taken)
            self.num_tokens += int(taken.sum())
            data, lengths = data[size:], lengths[len(taken) :]
            if shard.num_chunks == self.chunks_per_shard:
                self._close_shard()

    def _open_shard(self) -> IndexedDatasetWriter:
        if self._shard is None:
            self._shard = IndexedDatasetWriter(self.next_shard_prefix(), self.dtype)
        return self._shard

    def next_shard_prefix(self) -> Path:
        """Return where the next shard's files go, for one that the caller writes and adds with :meth:`add_shard`."""
        return self.folder / f"chunks-{len(self._shards):05d}"

    def add_shard(
        self, files: Mapping[str, FileChecksums], num_chunks: int, num_tokens: int, unused_bytes: int = 0
    ) -> None:
        """Add a shard whose ``.bin`` and ``.idx`` are in place at :meth:`next_shard_prefix`.

        ``unused_bytes`` at the end of ``.bin`` are in no chunk.
        """
        entry: dict[str, Any] = {"name": self.next_shard_prefix().name, "chunks": num_chunks, "tokens": num_tokens}
        if unused_bytes:
            entry["unused_bytes"] = unused_bytes
        self._checksums.files.update(files)
        self._shards.append(entry)
        self.num_chunks += num_chunks
        self.num_tokens += num_tokens

    def add_domains(self, names: Sequence[str], labels: np.ndarray) -> None:
        """Record the domain of every chunk: ``labels`` ``[num_chunks]``, numbers in ``names``."""
        self._domain_names = list(names)
        self.add_array(DOMAINS_NAME, np.asarray(labels, dtype=np.uint16))

    def _close_shard(self) -> None:
        shard, self._shard = self._shard, None
        if shard is None:
            return
        self._checksums.files.update(shard.close())
        self._shards.append({"name": shard.prefix.name, "chunks": shard.num_chunks, "tokens": shard.num_tokens})

    def close(self) -> None:
        """Close what is open, whether the dataset is finished or not."""
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.abort()

    def add_extra_file(self, name: str, contents: bytes) -> None:
        """Write another small file into the dataset; it has a checksum but is not part of the fingerprint."""
        (self.folder / name).write_bytes(contents)
        self._extra_files.append(name)

    def add_array(self, name: str, values: np.ndarray) -> None:
        """Write an array into the dataset, as part of its fingerprint."""
        write_array(self.folder / name, values)
        self._checksums.add_file(self.folder, name)

    def finish(
        self,
        producer: dict[str, Any],
        parents: Sequence[dict[str, Any]] = (),
        root_fingerprint: str | None = None,
        chunk_ids: np.ndarray | None = None,
    ) -> str:
        """Close the shards, write the rest, and return the dataset's fingerprint.

        Args:
            producer: what made it: ``tool``, its resolved ``config``, and whatever else is worth recording.
            parents: ``{"kind", "path", "fingerprint"}`` of the artefacts it was made from.
            root_fingerprint, chunk_ids: of a selection, the root dataset and the chunks' ids in it, int64
                ``[num_chunks]``.
        """
        self._close_shard()
        facts = self._facts()
        if chunk_ids is not None:
            write_array(self.folder / CHUNK_IDS_NAME, np.asarray(chunk_ids, dtype=np.int64))
            self._checksums.add_file(self.folder, CHUNK_IDS_NAME)
        write_array(self.folder / TOKEN_BYTES_NAME, self.tokenizer.token_byte_lengths.astype(np.int32))
        self._checksums.add_file(self.folder, TOKEN_BYTES_NAME)
        fingerprint = fingerprint_of({**facts, "root": root_fingerprint}, self._checksums)
        for name in [*self._extra_files, *self.tokenizer.copy_files(self.folder)]:
            self._checksums.add_file(self.folder, name)
        body = {
            "fingerprint": fingerprint,
            "root_fingerprint": root_fingerprint or fingerprint,
            **facts,
            "parents": list(parents),
            "producer": producer,
            "versions": versions(),
        }
        write_manifest(self.folder, KIND, body, self._checksums)
        return fingerprint

    def _facts(self) -> dict[str, Any]:
        """Return what the manifest says about the chunks themselves."""
        facts: dict[str, Any] = {
            "seq_length": self.seq_length,
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.tokenizer.eos_id,
            "pad_id": self.tokenizer.pad_id,
            "tokenizer_hash": self.tokenizer.hash,
            "dtype": self.dtype.name,
            "num_chunks": self.num_chunks,
            "num_tokens": self.num_tokens,
            "shards": self._shards,
        }
        if self._domain_names:
            facts["domains"] = self._domain_names
        if self.mask_prompts:
            facts["mask_prompts"] = True
        return facts
