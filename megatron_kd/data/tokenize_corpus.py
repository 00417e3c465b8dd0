"""Raw text to chunk datasets.

    python tools/tokenize_corpus.py --config FILE [input=… output=… tokenizer=… data.seq_length=…]

    JSONL files → blocks of lines → documents → ids + eos → split by document → chunks → shuffle → shards + manifest

Memory is bounded whatever the size of the corpus. ``heldout_fraction`` and ``reference_fraction`` of the documents
go to datasets of their own; which ones is decided by a hash of the text and the seed, so copies of a document stay
together.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from megatron_kd.config import to_mapping
from megatron_kd.data.artefact_folder import building
from megatron_kd.data.chunk_dataset import DEFAULT_CHUNKS_PER_SHARD, KIND, ChunkDataset, ChunkDatasetWriter
from megatron_kd.data.chunking import Chunker, Chunks, SentenceEnds
from megatron_kd.data.corpus_encoder import EncodedBlock, EncodingJob, encode_files
from megatron_kd.data.documents import BadLine, expand_inputs, parse_block, read_blocks
from megatron_kd.data.encoder import SAMPLE_BYTES, Engine, EngineCheck, choose_engine
from megatron_kd.data.indexed_dataset import dtype_for_vocab
from megatron_kd.data.manifest import MANIFEST_NAME, already_made, recipe_of
from megatron_kd.data.shuffle import ShuffleSpool, bucket_bits_for
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer
from megatron_kd.errors import DataError

QUARANTINE_NAME = "quarantine.jsonl"
SMALL_CORPUS_BYTES = 64 << 20
_COMPRESSION_GUESS = 4
_SAMPLE_FILES = 16


@dataclass(frozen=True)
class ChunkLengthConfig:
    """``data.*`` keys of ``tokenize_corpus``: ``seq_length``, positions per training row; a chunk has one id more."""

    seq_length: int

    def validate(self) -> Iterator[str]:
        """Yield what is wrong."""
        if self.seq_length < 1:
            yield f"data.seq_length must be at least 1, not {self.seq_length}"


@dataclass(frozen=True)
class TokenizeCorpusConfig:
    """Keys of ``tokenize_corpus``; ``docs/file_formats.md`` explains each."""

    input: tuple[str, ...]
    output: str
    tokenizer: str
    data: ChunkLengthConfig
    text_field: str = "text"
    domain_field: str | None = None
    chunking: Literal["packed", "sentence_end"] = "packed"
    flush_leftovers: bool = False
    prepend_bos: bool = False
    eos_token: str | None = None
    shuffle: bool = True
    seed: int = 0
    workers: int = 0
    engine: Engine = "auto"
    skip_bad_lines: bool = False
    max_bad_lines: int = 1000
    heldout_fraction: float = 0.0
    heldout_output: str | None = None
    reference_fraction: float = 0.0
    reference_output: str | None = None
    chunks_per_shard: int = DEFAULT_CHUNKS_PER_SHARD

    def validate(self) -> Iterator[str]:
        """Yield what is wrong."""
        for role in ("heldout", "reference"):
            fraction, output = getattr(self, f"{role}_fraction"), getattr(self, f"{role}_output")
            if not 0 <= fraction < 1:
                yield f"{role}_fraction must be at least 0 and below 1, not {fraction}"
            if (fraction > 0) != (output is not None):
                yield f"{role}_fraction ({fraction}) and {role}_output ({output}) go together: give both or neither"
        if self.heldout_fraction + self.reference_fraction >= 1:
            total = self.heldout_fraction + self.reference_fraction
            yield f"heldout_fraction + reference_fraction = {total} leaves nothing"
        outputs = [os.path.abspath(path) for path in (self.output, self.heldout_output, self.reference_output) if path]
        if len(set(outputs)) < len(outputs):
            yield f"output, heldout_output and reference_output must differ: {', '.join(outputs)}"
        if not self.input:
            yield "input names no file"
        for key in ("workers", "max_bad_lines"):
            if getattr(self, key) < 0:
                yield f"{key} must not be negative, not {getattr(self, key)}"
        if self.chunks_per_shard < 1:
            yield f"chunks_per_shard must be at least 1, not {self.chunks_per_shard}"
        if self.prepend_bos and self.chunking != "sentence_end":
            yield "prepend_bos=true needs chunking=sentence_end"


@dataclass
class Counts:
    """Running totals of a corpus."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    bad: list[BadLine] = field(default_factory=list)


def run(config: TokenizeCorpusConfig) -> dict[str, str]:
    """Tokenise a corpus; returns role (``train``, ``heldout``, ``reference``) → path of each dataset made.

    Raises:
        DataError: the corpus is missing, empty or malformed; the tokenizer is; an output exists and is something else.
    """
    paths = expand_inputs(config.input)
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    recipe = _recipe(config, paths, tokenizer)
    outputs = {"train": config.output, "heldout": config.heldout_output, "reference": config.reference_output}
    outputs = {role: output for role, output in outputs.items() if output}
    to_make = {role: output for role, output in outputs.items() if not _is_made(output, f"{recipe}-{role}", paths)}
    if not to_make:
        _say(f"{', '.join(outputs.values())}: already made from this input with these settings, nothing to do")
        return outputs
    check = choose_engine(tokenizer, _sample(config, paths), config.engine)
    counts = Counts()
    with contextlib.ExitStack() as stack:
        splits = {role: stack.enter_context(_Split.opened(role, config, to_make, tokenizer)) for role in outputs}
        _chunk_corpus(config, paths, tokenizer, check, splits, counts)
        producer = _producer(config, paths, check, counts)
        summaries = [splits[role].finish(producer, recipe) for role in reversed(outputs)]
    skipped = f", {len(counts.bad)} bad lines skipped" if counts.bad else ""
    _say(
        f"{counts.documents} documents, {counts.tokens} tokens from {len(paths)} files ({check.engine}{skipped}): "
        + "; ".join(reversed(summaries))
    )
    return outputs


class _Split:
    """One output: its chunker, and what collects its chunks."""

    def __init__(
        self, role: str, config: TokenizeCorpusConfig, output: str, folder: Path | None, tokenizer: LoadedTokenizer
    ) -> None:
        self.role, self.output, self._folder, self._config = role, output, folder, config
        self._chunker = _new_chunker(config, tokenizer)
        if folder is not None:
            self._writer = ChunkDatasetWriter(folder, tokenizer.info, config.data.seq_length, config.chunks_per_shard)
            bits = bucket_bits_for(_expected_bytes(expand_inputs(config.input)))
            seed = config.seed
            self._spool = ShuffleSpool(folder, self._writer.dtype, seed, bits) if config.shuffle else None

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, role: str, config: TokenizeCorpusConfig, to_make: dict[str, str], tokenizer: LoadedTokenizer
    ) -> Iterator["_Split"]:
        if role in to_make:
            with building(to_make[role]) as folder:
                split = cls(role, config, to_make[role], folder, tokenizer)
                try:
                    yield split
                finally:
                    split._close()
        else:
            yield cls(role, config, getattr(config, "output" if role == "train" else f"{role}_output"), None, tokenizer)

    def add(self, ids: np.ndarray, lengths: np.ndarray, domains: list[str]) -> None:
        if self._folder is not None and len(lengths):
            self._collect(self._chunker.add(ids, lengths, domains))

    def _collect(self, chunks: Chunks) -> None:
        (self._spool or self._writer).add(chunks.ids, chunks.lengths)

    def _close(self) -> None:
        self._writer.close()
        if self._spool is not None:
            self._spool.close()

    def finish(self, producer: dict[str, Any], recipe: str) -> str:
        if self._folder is None:
            return f"{self.output} was already made"
        if self._config.flush_leftovers:
            self._collect(self._chunker.flush())
        left = self._chunker.num_buffered
        if self._spool is not None:
            self._spool.drain(self._writer)
        if self._writer.num_chunks == 0:
            raise DataError(
                f"{self.output}: the {self.role} documents make no whole chunk ({left} ids, a chunk has "
                f"{self._config.data.seq_length + 1}); shorten data.seq_length, "
                "set flush_leftovers=true or give more text"
            )
        own = {"role": self.role, "leftover_tokens": left, "recipe": f"{recipe}-{self.role}"}
        bad = producer["bad_lines"] if self.role == "train" else []
        if bad:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad)
            self._writer.add_extra_file(QUARANTINE_NAME, text.encode("utf-8", "backslashreplace"))
        fingerprint = self._writer.finish({**producer, "bad_lines": len(producer["bad_lines"]), **own})
        return (
            f"{self.output} has {self._writer.num_chunks} chunks, {self._writer.num_tokens} tokens, "
            f"fingerprint {fingerprint[:12]}"
        )


def _chunk_corpus(
    config: TokenizeCorpusConfig,
    paths: list[str],
    tokenizer: LoadedTokenizer,
    check: EngineCheck,
    splits: dict[str, _Split],
    counts: Counts,
) -> None:
    job = EncodingJob(
        config.tokenizer,
        config.eos_token,
        check.engine,
        config.text_field,
        config.domain_field,
        dtype_for_vocab(tokenizer.info.vocab_size).name,
        config.seed if len(splits) > 1 else None,
    )
    total = sum(os.path.getsize(path) for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
        for block in encode_files(paths, job, _num_workers(config.workers, total)):
            _count(block, config, counts)
            for role, members in _members_of(block, config, splits):
                splits[role].add(*_select(block, members))
            bar.update(block.raw_bytes)
    if not counts.documents:
        raise DataError(f"{', '.join(config.input)}: the corpus holds no document")


def _count(block: EncodedBlock, config: TokenizeCorpusConfig, counts: Counts) -> None:
    counts.documents += len(block.lengths)
    counts.text_bytes += block.text_bytes
    counts.tokens += len(block.ids)
    counts.bad.extend(block.bad)
    if counts.bad and not config.skip_bad_lines:
        raise DataError(f"{counts.bad[0]}; mend the line, or skip such lines with skip_bad_lines=true")
    if len(counts.bad) > config.max_bad_lines:
        raise DataError(
            f"{counts.bad[config.max_bad_lines]}; that is bad line {config.max_bad_lines + 1}, more than "
            f"max_bad_lines={config.max_bad_lines}"
        )


def _members_of(
    block: EncodedBlock, config: TokenizeCorpusConfig, splits: dict[str, _Split]
) -> Iterator[tuple[str, np.ndarray]]:
    """(role, bool ``[documents]``) for every split: the hash, read as a number in [0, 1), names the role."""
    if len(splits) == 1:
        yield "train", np.ones(len(block.lengths), dtype=bool)
        return
    place = block.split_hashes.astype(np.float64) / 2.0**64
    heldout = place < config.heldout_fraction
    reference = ~heldout & (place < config.heldout_fraction + config.reference_fraction)
    for role, members in (("train", ~heldout & ~reference), ("heldout", heldout), ("reference", reference)):
        if role in splits:
            yield role, members


def _select(block: EncodedBlock, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if members.all():
        return block.ids, block.lengths, block.domains
    domains = [domain for domain, member in zip(block.domains, members, strict=True) if member]
    return block.ids[np.repeat(members, block.lengths)], block.lengths[members], domains


def _new_chunker(config: TokenizeCorpusConfig, tokenizer: LoadedTokenizer) -> Chunker:
    length = config.data.seq_length + 1
    if config.chunking == "packed":
        return Chunker(length)
    if config.prepend_bos and tokenizer.bos_id is None:
        raise DataError(f"{config.tokenizer}: names no bos_token, which prepend_bos=true needs")
    return Chunker(length, SentenceEnds.of(tokenizer), tokenizer.bos_id if config.prepend_bos else None)


def _recipe(config: TokenizeCorpusConfig, paths: list[str], tokenizer: LoadedTokenizer) -> str:
    irrelevant = ("output", "heldout_output", "reference_output", "workers", "engine", "tokenizer", "input")
    settings = {key: value for key, value in to_mapping(config).items() if key not in irrelevant}
    inputs = [[path, os.path.getsize(path)] for path in paths]
    return recipe_of(
        {"tool": "tokenize_corpus", "settings": settings, "inputs": inputs, "tokenizer": tokenizer.info.hash}
    )


def _is_made(output: str, recipe: str, paths: list[str]) -> bool:
    if not already_made(output, KIND, recipe):
        return False
    made_at = (Path(output) / MANIFEST_NAME).stat().st_mtime_ns
    newer = [path for path in paths if os.stat(path).st_mtime_ns > made_at]
    if newer:
        raise DataError(
            f"{output}: already exists, made before {newer[0]} was last changed; remove it to make it again"
        )
    ChunkDataset.open(output)
    return True


def _sample(config: TokenizeCorpusConfig, paths: list[str]) -> list[str]:
    """Documents from the start of up to 16 files, evenly chosen, about ``SAMPLE_BYTES`` in all."""
    chosen = [paths[index] for index in sorted({i * len(paths) // _SAMPLE_FILES for i in range(_SAMPLE_FILES)})]
    texts: list[str] = []
    for path in chosen:
        room = SAMPLE_BYTES // len(chosen)
        block = next(read_blocks(path, block_bytes=2 * room), None)
        for text in parse_block(block, config.text_field, config.domain_field).texts if block else []:
            texts.append(text)
            room -= len(text)
            if room <= 0:
                break
    return texts


def _producer(config: TokenizeCorpusConfig, paths: list[str], check: EngineCheck, counts: Counts) -> dict[str, Any]:
    return {
        "tool": "tokenize_corpus",
        "config": to_mapping(replace(config, workers=0)),
        "inputs": [{"path": path, "bytes": os.path.getsize(path)} for path in paths],
        "engine_check": check.as_mapping(),
        "documents": counts.documents,
        "text_bytes": counts.text_bytes,
        "corpus_tokens": counts.tokens,
        "bad_lines": [{"path": line.path, "line": line.line, "reason": line.reason} for line in counts.bad],
    }


def _num_workers(workers: int, total_bytes: int) -> int:
    if workers:
        return workers
    return 1 if total_bytes < SMALL_CORPUS_BYTES else len(os.sched_getaffinity(0))


def _expected_bytes(paths: list[str]) -> int:
    packed = (".gz", ".zst", ".zstd")
    return sum(os.path.getsize(path) * (_COMPRESSION_GUESS if path.endswith(packed) else 1) for path in paths)


def _say(line: str) -> None:
    sys.stdout.write(f"tokenize_corpus: {line}\n")
