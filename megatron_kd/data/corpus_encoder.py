"""Files of documents to ids: units → parts → blocks, in this process or in several, in the same order whoever works.

    units of a corpus  →  blocks of a few MiB  →  workers: parse, encode, append eos  →  parts on disk, and the blocks

Workers parse and encode; this process reads, decompresses and receives, with a bounded number of blocks under way.
Parts that are on disk already are read instead of made again.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_kd.data.document_format import (
    Block,
    DocumentFormat,
    LoadedBlock,
    RangeBlock,
    RowBlock,
    is_divisible,
    load,
    parse,
    read_blocks,
)
from megatron_kd.data.documents import BadLine, Documents
from megatron_kd.data.encoded_parts import EncodedBlock, EncodedParts, PartWriter, Unit
from megatron_kd.data.encoder import DocumentEncoder
from megatron_kd.data.tokenization import documents_of, load_tokenizer
from megatron_kd.data.workers import prefetch, worker_pool
from megatron_kd.errors import DataError

PART_BYTES = 64 << 20
_BLOCKS_PER_WORKER = 4


@dataclass(frozen=True)
class EncodingJob:
    """All that a worker needs to know.

    Attributes:
        tokenizer, eos_token: see ``load_tokenizer``.
        engine: see ``choose_engine``.
        form: what the files hold.
        dtype: of the ids handed back.
        split_seed: of the documents' split hashes; None for none.
    """

    tokenizer: str
    eos_token: str | None
    engine: str
    form: DocumentFormat
    dtype: str
    split_seed: int | None


@dataclass(frozen=True)
class _Work:
    unit: Unit
    block: Block


@dataclass(frozen=True)
class _PartEnd:
    unit: Unit
    part: int
    is_last: bool


@dataclass(frozen=True)
class _Found:
    name: str


_Event = _Work | _PartEnd | _Found


def units_of(paths: Sequence[str], form: DocumentFormat) -> list[Unit]:
    """The corpus cut into what one task can take: ranges of ``PART_BYTES`` where a file allows it, else whole files."""
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
    """Encode units in order, part by part; each part is on disk once its blocks have been handed on.

    Args:
        units: some of ``units_of``.
        job: how.
        parts: where parts are kept; those that are there are handed on whole.
        workers: processes; 1 encodes in this one.

    Raises:
        DataError: a file is damaged, or a document too long to hold.
    """
    writer: PartWriter | None = None
    encoded = _encode_here if workers == 1 else _encode_in_processes
    try:
        with closing(encoded(_events(units, job.form, parts), job, workers)) as results:
            for event, block in results:
                if isinstance(event, _Found):
                    yield parts.read(event.name)
                elif isinstance(event, _PartEnd):
                    writer = writer or parts.new_part(event.unit)
                    writer.finish(event.part, event.is_last)
                    writer = None
                elif block is not None:
                    writer = writer or parts.new_part(event.unit)
                    writer.add(block)
                    yield block
    finally:
        if writer is not None:
            writer.abort()


def read_parts(units: Sequence[Unit], parts: EncodedParts) -> Iterator[EncodedBlock]:
    """The parts that tasks have left, in order.

    Raises:
        DataError: one is missing or damaged.
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


def _events(units: Sequence[Unit], form: DocumentFormat, parts: EncodedParts) -> Iterator[_Event]:
    for unit in units:
        found = parts.usable(unit)
        for name in found.names:
            yield _Found(name)
        if found.is_complete:
            continue
        part, size = 0, 0
        for block in read_blocks(unit.path, form, start=unit.start, stop=unit.stop):
            if size >= PART_BYTES:
                if part >= len(found.names):
                    yield _PartEnd(unit, part, is_last=False)
                part, size = part + 1, 0
            size += _size_of(block)
            if part >= len(found.names):
                yield _Work(unit, block)
        yield _PartEnd(unit, part, is_last=True)


def _size_of(block: Block) -> int:
    if isinstance(block, RangeBlock):
        return block.stop - block.start
    if not isinstance(block, RowBlock):
        return len(block.data)
    return sum(len(value) for column in block.columns.values() for value in column if isinstance(value, str))


def _encode_here(
    events: Iterator[_Event], job: EncodingJob, workers: int
) -> Iterator[tuple[_Event, EncodedBlock | None]]:
    def parsed() -> Iterator[tuple[_Event, LoadedBlock | None, Documents | None]]:
        for event in events:
            block = load(event.block) if isinstance(event, _Work) else None
            yield event, block, None if block is None else parse(block, job.form)

    for event, block, documents in prefetch(parsed, depth=2):
        is_work = isinstance(event, _Work) and block is not None and documents is not None
        yield event, _encode_documents(documents, block, event.unit.start, job) if is_work else None


def _encode_in_processes(
    events: Iterator[_Event], job: EncodingJob, workers: int
) -> Iterator[tuple[_Event, EncodedBlock | None]]:
    with worker_pool(workers) as pool:
        under_way: deque[tuple[_Event, Future[EncodedBlock] | None]] = deque()

        def oldest() -> tuple[_Event, EncodedBlock | None]:
            event, future = under_way.popleft()
            return event, future.result() if future is not None else None

        try:
            for event in events:
                is_work = isinstance(event, _Work)
                under_way.append((event, pool.submit(_encode_block, event, job) if is_work else None))
                while len(under_way) > _BLOCKS_PER_WORKER * workers or (under_way and under_way[0][1] is None):
                    yield oldest()
            while under_way:
                yield oldest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_block(work: _Work, job: EncodingJob) -> EncodedBlock:
    block = load(work.block)
    return _encode_documents(parse(block, job.form), block, work.unit.start, job)


def _encode_documents(documents: Documents, block: LoadedBlock, unit_start: int, job: EncodingJob) -> EncodedBlock:
    encoder, eos_id = _encoder_of(job)
    encoder.spot_check(documents.texts)
    pieces = encoder.pieces(documents.texts)
    responses = None if documents.responses is None else encoder.pieces(documents.responses)
    prompt_lengths = [] if responses is None else [len(prompt) for prompt in pieces]
    ids, lengths = documents_of(
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
