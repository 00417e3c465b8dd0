"""Write encoded documents as chunk datasets: the role of each document or chunk, its chunking, its order, its files.

    encoded block  →  role by a hash  →  chunker  →  (shuffle)  →  shards + manifest, one dataset per role

With ``split_by=document`` the hash is of the text, each role has buffers of its own, and copies of a document stay
together. With ``split_by=chunk`` there is one set of buffers, and the hash is of the chunk's number.
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
from megatron_kd.data.external_shuffle import ExternalShuffle, bucket_bits_for
from megatron_kd.data.random_numbers import hash64, hash_int
from megatron_kd.data.tokenization import LoadedTokenizer
from megatron_kd.errors import DataError

QUARANTINE_NAME = "quarantine.jsonl"
ROLES = ("train", "heldout", "reference")
Chunking = Literal["packed", "sentence_end", "prompt_response"]
SplitBy = Literal["document", "chunk"]
_SPLIT_SALT = 0x5EED_0F_5B117


@dataclass(frozen=True)
class OutputSettings:
    """The keys of ``tokenize_corpus`` that its outputs depend on: how chunks are made and where they go."""

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
        """Return the index in ``ROLES`` for uint64 hashes ``[n]``, each read as a number in [0, 1)."""
        place = hashes.astype(np.float64) / 2.0**64
        heldout = place < self.heldout_fraction
        reference = ~heldout & (place < self.heldout_fraction + self.reference_fraction)
        return np.where(heldout, 1, np.where(reference, 2, 0))


class CorpusOutputs:
    """All outputs of one corpus.

    Args:
        settings: how chunks are made and where they go.
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
        """Give chunks to the roles that their numbers decide."""
        numbers = np.arange(self._num_chunks, self._num_chunks + len(chunks.lengths), dtype=np.uint64)
        self._num_chunks += len(numbers)
        roles = self._settings.roles_at(hash64(numbers ^ np.uint64(hash_int(self._settings.seed ^ _SPLIT_SALT))))
        for role, output in self._outputs.items():
            members = roles == ROLES.index(role)
            if members.any():
                output.collect(chunks.select(members))

    def finish(self, producer: dict[str, Any], bad: Sequence[dict[str, Any]], recipe: str) -> list[str]:
        """Flush, shuffle, and write the manifests; return one line about each dataset made."""
        left, dropped = {}, {}
        for role, chunker in self._chunkers.items():
            if self._settings.flush_leftovers:
                chunks = chunker.flush()
                if role == "all":
                    self._route(chunks)
                elif role in self._outputs:
                    self._outputs[role].collect(chunks)
            left[role], dropped[role] = chunker.num_buffered, chunker.num_dropped
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
        self._shuffle = (
            ExternalShuffle(folder, self.writer.dtype, settings.seed, bucket_bits) if settings.shuffle else None
        )
        self._domains: list[np.ndarray] = []
        self._prompts: list[np.ndarray] = []

    def collect(self, chunks: Chunks) -> None:
        if not len(chunks.lengths):
            return
        if self._shuffle is not None:
            self._shuffle.add(chunks)
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
        for chunks in self._shuffle.drain() if self._shuffle is not None else ():
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
        raise DataError(f"{tokenizer.path}: names no bos_token, which prepend_bos=true needs; set prepend_bos=false")
    return Chunker(length, SentenceEnds.of(tokenizer), tokenizer.bos_id if settings.prepend_bos else None)


def _chunks_of(chunker: Chunker | PromptResponseChunker, block: EncodedBlock) -> Chunks:
    return chunker.add(block.ids, block.lengths, block.domains, block.prompt_lengths)


def _select(block: EncodedBlock, members: np.ndarray) -> EncodedBlock:
    if members.all():
        return block
    domains = [domain for domain, member in zip(block.domains, members, strict=True) if member]
    prompts = block.prompt_lengths[members] if len(block.prompt_lengths) else block.prompt_lengths
    return EncodedBlock(
        block.path, 0, 0, block.ids[np.repeat(members, block.lengths)], block.lengths[members], domains,
        block.split_hashes[members], prompts, [], 0, 0,
    )  # fmt: skip
