"""Files of documents to ids, block by block, in this process or in several: the same blocks in the same order.

A block is a few MiB of whole lines. Workers parse and encode; this process reads, decompresses and receives, with a
bounded number of blocks under way.
"""

import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_kd.data.documents import BadLine, Documents, LineBlock, parse_block, read_blocks
from megatron_kd.data.encoder import DocumentEncoder
from megatron_kd.data.prefetch import prefetch
from megatron_kd.data.tokenization import append_eos, load_tokenizer


@dataclass(frozen=True)
class EncodingJob:
    """All that a worker needs to know.

    Attributes:
        tokenizer, eos_token: see ``load_tokenizer``.
        engine: ``gigatoken`` or ``tokenizers``.
        text_field, domain_field: see ``parse_block``.
        dtype: of the ids handed back.
        split_seed: of the documents' split hashes; None for none.
    """

    tokenizer: str
    eos_token: str | None
    engine: str
    text_field: str
    domain_field: str | None
    dtype: str
    split_seed: int | None


@dataclass(frozen=True)
class EncodedBlock:
    """The documents of one block as ids, each ended by eos.

    Attributes:
        ids: ``[sum(lengths)]``.
        lengths: int64 ``[n]``.
        domains: n labels.
        split_hashes: uint64 ``[n]``, a function of the text and the split seed; empty without one.
        bad: lines that hold no usable document.
        text_bytes, raw_bytes: UTF-8 bytes of text, and bytes read from the file.
    """

    ids: np.ndarray
    lengths: np.ndarray
    domains: list[str]
    split_hashes: np.ndarray
    bad: list[BadLine]
    text_bytes: int
    raw_bytes: int


def encode_files(paths: Sequence[str], job: EncodingJob, workers: int) -> Iterator[EncodedBlock]:
    """Encode every block of every file, in order.

    Args:
        paths: JSONL files.
        job: how.
        workers: processes; 1 encodes in this one, with the tokenizer library's own threads.

    Raises:
        DataError: a compressed file is truncated or damaged.
    """
    if workers == 1:
        yield from _encode_here(paths, job)
    else:
        yield from _encode_in_processes(paths, job, workers)


def _encode_here(paths: Sequence[str], job: EncodingJob) -> Iterator[EncodedBlock]:
    def parsed() -> Iterator[tuple[LineBlock, Documents]]:
        for block in _blocks(paths):
            yield block, parse_block(block, job.text_field, job.domain_field)

    for block, documents in prefetch(parsed, depth=2):
        yield _encode_documents(documents, block.raw_bytes, job)


def _encode_in_processes(paths: Sequence[str], job: EncodingJob, workers: int) -> Iterator[EncodedBlock]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        under_way: deque[Future[EncodedBlock]] = deque()
        try:
            for block in _blocks(paths):
                under_way.append(pool.submit(_encode_block, block, job))
                if len(under_way) > 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _blocks(paths: Sequence[str]) -> Iterator[LineBlock]:
    for path in paths:
        yield from read_blocks(path)


def _encode_block(block: LineBlock, job: EncodingJob) -> EncodedBlock:
    return _encode_documents(parse_block(block, job.text_field, job.domain_field), block.raw_bytes, job)


def _encode_documents(documents: Documents, raw_bytes: int, job: EncodingJob) -> EncodedBlock:
    encoder, eos_id = _encoder_of(job)
    encoder.spot_check(documents.texts)
    ids, lengths = encoder.encode(documents.texts)
    ids, lengths = append_eos(ids, lengths, eos_id)
    return EncodedBlock(
        ids.astype(job.dtype),
        lengths,
        documents.domains,
        _split_hashes(documents.texts, job.split_seed),
        documents.bad,
        sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in documents.texts),
        raw_bytes,
    )


@lru_cache(maxsize=1)
def _encoder_of(job: EncodingJob) -> tuple[DocumentEncoder, int]:
    tokenizer = load_tokenizer(job.tokenizer, job.eos_token)
    return DocumentEncoder(tokenizer, job.engine), tokenizer.info.eos_id


def _split_hashes(texts: Sequence[str], seed: int | None) -> np.ndarray:
    if seed is None:
        return np.zeros(0, dtype=np.uint64)
    key = str(seed).encode()
    digests = [hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _start_worker() -> None:
    """One thread a worker; and a worker whose parent was killed, which would wait for work for ever, ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
