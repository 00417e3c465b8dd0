"""Encode a corpus: files → units → parts → blocks of ids, in the order of the corpus, whoever works.

    unit  →  blocks of a few MiB  →  workers: load, parse, encode, append eos  →  parts on disk, and the encoded blocks

Workers are processes, or this one; it decompresses and receives, with a bounded number of blocks in flight. Parts that
are on disk already are read instead of made again.
"""

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_kd.data.corpus_files import BadLine, Block, DocumentFormat, Documents, LoadedBlock
from megatron_kd.data.document_formats import is_divisible, read_blocks
from megatron_kd.data.encoded_parts import EncodedBlock, EncodedParts, PartWriter, Unit
from megatron_kd.data.tokenization import load_tokenizer
from megatron_kd.data.tokenizer_engine import DocumentEncoder, join_documents
from megatron_kd.data.workers import prefetch, worker_pool
from megatron_kd.errors import DataError

PART_BYTES = 64 << 20
_BLOCKS_PER_WORKER = 4


@dataclass(frozen=True)
class EncodingJob:
    """Everything that a worker needs to know.

    Attributes:
        tokenizer, eos_token: see ``load_tokenizer``.
        engine: see ``choose_engine``.
        form: what the files hold.
        dtype: of the ids.
        split_seed: of the documents' split hashes; None for none.
    """

    tokenizer: str
    eos_token: str | None
    engine: str
    form: DocumentFormat
    dtype: str
    split_seed: int | None


@dataclass(frozen=True)
class _Step:
    """What comes next in the order of the corpus: a block to encode, the end of a part, or a part that is there."""

    unit: Unit
    block: Block | None = None
    ended_part: int | None = None
    is_last: bool = False
    found: str | None = None


_Encoded = Generator[tuple[_Step, EncodedBlock | None], None, None]
"""Every step in order, with the encoded block of those that have one."""


def units_of(paths: Sequence[str], form: DocumentFormat) -> list[Unit]:
    """Cut a corpus into what one task can take: ranges of ``PART_BYTES`` where a file allows it, else whole files."""
    units: list[Unit] = []
    for path in paths:
        size = os.path.getsize(path)
        if is_divisible(path, form):
            for start in range(0, max(size, 1), PART_BYTES):
                units.append(Unit(len(units), path, start, min(start + PART_BYTES, size)))
        else:
            units.append(Unit(len(units), path))
    return units


def encode_corpus(units: Sequence[Unit], job: EncodingJob, parts: EncodedParts, workers: int) -> Iterator[EncodedBlock]:
    """Encode units in order, part by part; each part is on disk once its blocks have been yielded.

    Args:
        units: some of ``units_of``.
        job: how to encode.
        parts: where parts are kept; each that is there already is yielded as one block.
        workers: processes; 1 encodes in this one.

    Raises:
        DataError: a file is damaged, or a document too long to hold.
    """
    writer: PartWriter | None = None
    encode = _encode_here if workers == 1 else _encode_in_processes
    try:
        with closing(encode(_steps(units, job.form, parts), job, workers)) as encoded:
            for step, block in encoded:
                if step.found is not None:
                    yield parts.read(step.found)
                elif step.ended_part is not None:
                    writer = writer or parts.new_part(step.unit)
                    writer.finish(step.ended_part, step.is_last)
                    writer = None
                elif block is not None:
                    writer = writer or parts.new_part(step.unit)
                    writer.add(block)
                    yield block
    finally:
        if writer is not None:
            writer.abort()


def read_parts(units: Sequence[Unit], parts: EncodedParts) -> Iterator[EncodedBlock]:
    """Yield the parts that tasks have made, in order, each as one block.

    Raises:
        DataError: a part is missing or damaged.
    """
    missing = [unit for unit in units if not parts.finished(unit).is_complete]
    if missing:
        first = missing[0]
        raise DataError(
            f"{parts.store.folder}: {len(missing)} of {len(units)} units are not encoded yet, the first of them "
            f"{first.path} from byte {first.start}; run the tasks that stopped again, then merge"
        )
    for unit in units:
        for name in parts.finished(unit).names:
            yield parts.read(name)


def _steps(units: Sequence[Unit], form: DocumentFormat, parts: EncodedParts) -> Iterator[_Step]:
    for unit in units:
        usable = parts.usable(unit)
        for name in usable.names:
            yield _Step(unit, found=name)
        if usable.is_complete:
            continue
        part, size = 0, 0
        for block in read_blocks(unit.path, form, start=unit.start, stop=unit.stop):
            if size >= PART_BYTES:
                if part >= len(usable.names):
                    yield _Step(unit, ended_part=part)
                part, size = part + 1, 0
            size += block.size
            if part >= len(usable.names):
                yield _Step(unit, block)
        yield _Step(unit, ended_part=part, is_last=True)


def _encode_here(steps: Iterator[_Step], job: EncodingJob, workers: int) -> _Encoded:
    def parsed() -> Iterator[tuple[_Step, tuple[Documents, LoadedBlock] | None]]:
        for step in steps:
            block = None if step.block is None else step.block.load()
            yield step, None if block is None else (block.parse(job.form), block)

    for step, found in prefetch(parsed, depth=2):
        yield step, None if found is None else _encode_documents(*found, step.unit.start, job)


def _encode_in_processes(steps: Iterator[_Step], job: EncodingJob, workers: int) -> _Encoded:
    with worker_pool(workers) as pool:
        in_flight: deque[tuple[_Step, Future[EncodedBlock] | None]] = deque()

        def oldest() -> tuple[_Step, EncodedBlock | None]:
            step, future = in_flight.popleft()
            return step, None if future is None else future.result()

        try:
            for step in steps:
                future = None if step.block is None else pool.submit(_encode_block, step.block, step.unit.start, job)
                in_flight.append((step, future))
                while len(in_flight) > _BLOCKS_PER_WORKER * workers or (in_flight and in_flight[0][1] is None):
                    yield oldest()
            while in_flight:
                yield oldest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_block(block: Block, unit_start: int, job: EncodingJob) -> EncodedBlock:
    loaded = block.load()
    return _encode_documents(loaded.parse(job.form), loaded, unit_start, job)


def _encode_documents(documents: Documents, block: LoadedBlock, unit_start: int, job: EncodingJob) -> EncodedBlock:
    encoder, eos_id = _encoder_of(job)
    encoder.spot_check(documents.texts)
    pieces = encoder.pieces(documents.texts)
    responses = None if documents.responses is None else encoder.pieces(documents.responses)
    prompt_lengths = [] if responses is None else [len(prompt) for prompt in pieces]
    ids, lengths = join_documents(
        zip(pieces) if responses is None else zip(pieces, responses, strict=True), eos_id, job.dtype
    )
    texts = [*documents.texts, *(documents.responses or ())]
    bad = [BadLine(line.path, line.line - block.first_line + 1, line.reason) for line in documents.bad]
    return EncodedBlock(
        documents.path,
        unit_start,
        block.num_lines,
        ids,
        lengths,
        documents.domains,
        _split_hashes(documents.texts, job.split_seed),
        np.array(prompt_lengths, dtype=np.int32),
        bad,
        sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts),
        block.raw_bytes,
    )


@lru_cache(maxsize=1)
def _encoder_of(job: EncodingJob) -> tuple[DocumentEncoder, int]:
    tokenizer = load_tokenizer(job.tokenizer, job.eos_token)
    return DocumentEncoder(tokenizer, job.engine), tokenizer.eos_id


def _split_hashes(texts: Sequence[str], seed: int | None) -> np.ndarray:
    if seed is None:
        return np.zeros(0, dtype=np.uint64)
    key = str(seed).encode()
    digests = [hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8")
