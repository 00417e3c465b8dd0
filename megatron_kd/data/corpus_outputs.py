"""Encoded documents to chunk datasets: which role a document or chunk has, its chunking, its order, its files.

    encoded block  →  role by a hash  →  chunker  →  (shuffle)  →  shards + manifest, one dataset a role

With ``split_by=document`` the hash is of the text, each role has buffers of its own, and copies of a document stay
together. With ``split_by=chunk`` there is one set of buffers, and the hash is of the chunk's number.

A seeded shuffle of any number of chunks in bounded memory.

The order is that of a 64-bit key, a bijective function of (seed, chunk number), so it depends on nothing else. While
chunks arrive they are appended to the bucket that the key's top bits name; at the end each bucket is read whole, sorted
by key and written out. Every byte is written and read twice. What waits for its bucket is held up to ``PENDING_BYTES``;
a bucket's file is open only while it is written, so there may be thousands.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.data.chunk_dataset import PROMPT_LENGTHS_NAME
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.chunking import Chunker, Chunks, PromptResponseChunker, SentenceEnds
from megatron_kd.data.encoded_parts import EncodedBlock
from megatron_kd.data.random_numbers import mix64, mix_int
from megatron_kd.data.tokenization import LoadedTokenizer
from megatron_kd.errors import DataError

QUARANTINE_NAME = "quarantine.jsonl"
ROLES = ("train", "heldout", "reference")
Chunking = Literal["packed", "sentence_end", "prompt_response"]
SplitBy = Literal["document", "chunk"]
_SPLIT_SALT = 0x5EED_0F_5B117


@dataclass(frozen=True)
class OutputSettings:
    """How chunks are made and where they go; the keys of ``tokenize_corpus`` that its outputs depend on."""

    seq_length: int
    chunking: Chunking
    prepend_bos: bool
    flush_leftovers: bool
    shuffle: bool
    seed: int
    chunks_per_shard: int
    split_by: SplitBy
    heldout_fraction: float
    reference_fraction: float
    outputs: Mapping[str, str]
    """Role → path; ``train`` always."""

    def roles_at(self, hashes: np.ndarray) -> np.ndarray:
        """Index in ``ROLES`` for uint64 hashes ``[n]``: a hash, read as a number in [0, 1), names the role."""
        place = hashes.astype(np.float64) / 2.0**64
        heldout = place < self.heldout_fraction
        reference = ~heldout & (place < self.heldout_fraction + self.reference_fraction)
        return np.where(heldout, 1, np.where(reference, 2, 0))


class CorpusOutputs:
    """All outputs of one corpus.

    Args:
        settings: see there.
        to_make: role → path of the datasets that are not there yet.
        tokenizer: of the ids.
        expected_bytes: of text, roughly; decides the number of shuffle buckets, never the order.
    """

    def __init__(
        self, settings: OutputSettings, to_make: Mapping[str, str], tokenizer: LoadedTokenizer, expected_bytes: int
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._bucket_bits = bucket_bits_for(expected_bytes)
        self._to_make = to_make
        self._outputs: dict[str, _Output] = {}
        chunked = settings.outputs if settings.split_by == "document" else {"all": ""}
        self._chunkers = {role: _new_chunker(settings, tokenizer) for role in chunked}
        self._num_chunks = 0

    @contextlib.contextmanager
    def opened(self) -> Iterator["CorpusOutputs"]:
        """Build the outputs' folders; each appears at the end of the block, the training set last."""
        with contextlib.ExitStack() as stack:
            for role in sorted(self._to_make, key=ROLES.index):
                folder = stack.enter_context(building(self._to_make[role]))
                self._outputs[role] = _Output(self._settings, folder, self._tokenizer, self._bucket_bits)
                stack.callback(self._outputs[role].writer.close)
            yield self

    def add(self, block: EncodedBlock) -> None:
        """Append documents."""
        if "all" in self._chunkers:
            self._route(_chunks_of(self._chunkers["all"], block))
        elif len(self._chunkers) == 1:
            self._outputs["train"].collect(_chunks_of(self._chunkers["train"], block))
        else:
            roles = self._settings.roles_at(block.split_hashes)
            for role, output in self._outputs.items():
                members = roles == ROLES.index(role)
                if members.any():
                    output.collect(_chunks_of(self._chunkers[role], _select(block, members)))

    def _route(self, chunks: Chunks) -> None:
        """Give chunks to the roles that their numbers name."""
        numbers = np.arange(self._num_chunks, self._num_chunks + len(chunks.lengths), dtype=np.uint64)
        self._num_chunks += len(numbers)
        roles = self._settings.roles_at(mix64(numbers ^ np.uint64(mix_int(self._settings.seed ^ _SPLIT_SALT))))
        for role, output in self._outputs.items():
            members = roles == ROLES.index(role)
            if members.any():
                output.collect(chunks.select(members))

    def finish(self, producer: dict[str, Any], bad: Sequence[dict[str, Any]], recipe: str) -> list[str]:
        """Flush, shuffle, and write the manifests; one line to tell for each dataset made."""
        left, dropped = {}, {}
        for role, chunker in self._chunkers.items():
            if isinstance(chunker, PromptResponseChunker):
                left[role], dropped[role] = 0, chunker.num_dropped
                continue
            if self._settings.flush_leftovers:
                chunks = chunker.flush()
                if role == "all":
                    self._route(chunks)
                elif role in self._outputs:
                    self._outputs[role].collect(chunks)
            left[role], dropped[role] = chunker.num_buffered, 0
        lines = []
        for role, output in self._outputs.items():
            source = role if role in left else "all"
            facts = {"role": role, "leftover_tokens": left[source], "recipe": f"{recipe}-{role}"}
            if self._settings.chunking == "prompt_response":
                facts["dropped_documents"] = dropped[source]
            lines.append(
                output.finish(
                    self._to_make[role],
                    producer | facts,
                    bad if role == "train" else (),
                    left[source],
                    self._chunkers[source].domain_names,
                )
            )
        return lines


class _Output:
    """One dataset under construction."""

    def __init__(self, settings: OutputSettings, folder: Path, tokenizer: LoadedTokenizer, bucket_bits: int) -> None:
        self._settings = settings
        self.writer = ChunkDatasetWriter(folder, tokenizer.info, settings.seq_length, settings.chunks_per_shard)
        spool = ShuffleSpool(folder, self.writer.dtype, settings.seed, bucket_bits) if settings.shuffle else None
        self._spool = spool
        self._domains: list[np.ndarray] = []
        self._prompts: list[np.ndarray] = []

    def collect(self, chunks: Chunks) -> None:
        if not len(chunks.lengths):
            return
        if self._spool is not None:
            self._spool.add(chunks)
        else:
            self._write(chunks)

    def _write(self, chunks: Chunks) -> None:
        self.writer.add(chunks.ids, chunks.lengths)
        if chunks.domains is not None:
            self._domains.append(chunks.domains)
        if chunks.prompt_lengths is not None:
            self._prompts.append(chunks.prompt_lengths)

    def finish(
        self, path: str, producer: dict[str, Any], bad: Sequence[dict[str, Any]], left: int, domain_names: list[str]
    ) -> str:
        for chunks in self._spool.drain() if self._spool is not None else ():
            self._write(chunks)
        if self.writer.num_chunks == 0:
            raise DataError(
                f"{path}: the {producer['role']} documents make no whole chunk ({left} ids, a chunk has "
                f"{self._settings.seq_length + 1}); shorten data.seq_length, set flush_leftovers=true or give more text"
            )
        if domain_names != [""]:
            self.writer.add_domains(domain_names, np.concatenate(self._domains))
        if self._prompts:
            self.writer.add_array(PROMPT_LENGTHS_NAME, np.concatenate(self._prompts).astype(np.int32))
            self.writer.mask_prompts = True
        if bad:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad)
            self.writer.add_extra_file(QUARANTINE_NAME, text.encode("utf-8", "backslashreplace"))
        fingerprint = self.writer.finish(producer)
        return (
            f"{path} has {self.writer.num_chunks} chunks, {self.writer.num_tokens} tokens, "
            f"fingerprint {fingerprint[:12]}"
        )


def _new_chunker(settings: OutputSettings, tokenizer: LoadedTokenizer) -> Chunker | PromptResponseChunker:
    length = settings.seq_length + 1
    if settings.chunking == "packed":
        return Chunker(length)
    if settings.chunking == "prompt_response":
        return PromptResponseChunker(length)
    if settings.prepend_bos and tokenizer.bos_id is None:
        raise DataError(f"{tokenizer.path}: names no bos_token, which prepend_bos=true needs")
    return Chunker(length, SentenceEnds.of(tokenizer), tokenizer.bos_id if settings.prepend_bos else None)


def _chunks_of(chunker: Chunker | PromptResponseChunker, block: EncodedBlock) -> Chunks:
    if isinstance(chunker, PromptResponseChunker):
        return chunker.add(block.ids, block.lengths, block.domains, block.prompt_lengths)
    if not len(block.lengths):
        return Chunks(block.ids, block.lengths)
    return chunker.add(block.ids, block.lengths, block.domains)


def _select(block: EncodedBlock, members: np.ndarray) -> EncodedBlock:
    if members.all():
        return block
    domains = [domain for domain, member in zip(block.domains, members, strict=True) if member]
    prompts = block.prompt_lengths[members] if len(block.prompt_lengths) else block.prompt_lengths
    return EncodedBlock(
        block.path, 0, 0, block.ids[np.repeat(members, block.lengths)], block.lengths[members], domains,
        block.split_hashes[members], prompts, [], 0, 0,
    )  # fmt: skip


BUCKET_BYTES = 128 << 20
MAX_BUCKET_BITS = 14
PENDING_BYTES = 256 << 20
_NONE = -1
_RECORD = np.dtype([("key", "<u8"), ("length", "<i4"), ("domain", "<i4"), ("prompt", "<i4")])


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
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending_bytes = 0

    def add(self, chunks: Chunks) -> None:
        """Append chunks."""
        lengths = chunks.lengths
        numbers = np.arange(self._count, self._count + len(lengths), dtype=np.uint64)
        self._count += len(lengths)
        records = np.empty(len(lengths), dtype=_RECORD)
        records["key"] = mix64(numbers ^ self._seed)
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
                file.write(memoryview(np.ascontiguousarray(data).view(np.uint8)))

    def _path(self, bucket: int, extension: str) -> Path:
        return self._folder / f"bucket-{bucket:05d}{extension}"

    def drain(self) -> Iterator[Chunks]:
        """All chunks in shuffled order; the bucket files are removed as they are read."""
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
    """The pieces ``ids[start : start + length]`` one after another."""
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    parts = [ids[start : start + length] for start, length in pairs]
    return np.concatenate(parts) if parts else ids[:0]
