"""Parts of the cache benchmark: synthetic teachers at Qwen's vocabulary, datasets and shards in a folder."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.losses import OutputHead
from megatron_kd.teachers.cache.cache_reader import INDEX_DTYPE
from megatron_kd.teachers.cache.cache_writer import ShardWriter
from megatron_kd.teachers.cache.codec import Codec, Entries
from megatron_kd.teachers.cache.sparsifier import Sparsifier
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

VOCABULARY = 151_936
TEACHERS = 64
DRAWS = 50
UNIQUE_IDS = 12.1


def zipf_exponent(unique_ids: float, draws: int) -> float:
    """Return the s of p ~ rank ** -s for which ``draws`` draws give ``unique_ids`` distinct ids on average."""
    ranks, low, high = np.arange(1, VOCABULARY + 1, dtype=np.float64), 0.5, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        p = ranks**-middle
        p /= p.sum()
        expected = -np.expm1(draws * np.log1p(-p)).sum()
        low, high = (middle, high) if expected > unique_ids else (low, middle)
    return low


def synthetic_teachers(exponents: np.ndarray, seed: int = 0) -> OutputHead:
    """Return a head for which unit vector i gives teacher i: Zipf with exponent i over shuffled ids."""
    chance = np.random.default_rng(seed)
    logits = np.empty((VOCABULARY, len(exponents)), dtype=np.float32)
    falling = np.log(np.arange(1, VOCABULARY + 1))
    for column, exponent in enumerate(exponents):
        logits[chance.permutation(VOCABULARY), column] = -exponent * falling
    return OutputHead(torch.from_numpy(logits), valid_vocab_size=VOCABULARY)


def entries_of(codec: Codec, head: OutputHead, tokens: int) -> Entries:
    """Return what the codec keeps of ``tokens`` tokens, the teachers of ``head`` in turn."""
    teachers = head.weight.shape[1]
    hidden = torch.eye(teachers)[torch.arange(tokens) % teachers]
    return Sparsifier(codec, head, None)(hidden, np.arange(tokens) // 1024, np.arange(tokens) % 1024)


def write_shard(codec: Codec, entries: Entries, chunks: int, folder: str) -> tuple[float, int]:
    """Encode and write the same chunk many times as the tool does; return seconds and bytes."""
    store = WorkStore(Path(folder) / "cache", {})
    store.claim()
    present = np.ones(len(entries.counts), dtype=bool)
    writer = ShardWriter(store, 0, None, commit_seconds=20.0)
    started, size = time.perf_counter(), 0
    for _ in range(chunks):
        record = codec.encode(present, entries)
        index = np.zeros(1, dtype=INDEX_DTYPE)
        index["positions"] = index["tokens"] = len(present)
        index["ids"] = len(entries.ids)
        writer.add([record], index)
        size += len(record)
    writer.commit(complete=True)
    writer.close()
    store.close()
    return time.perf_counter() - started, size


def in_processes(function: Callable[..., Any], arguments: list[tuple]) -> list[Any]:
    """Run ``function`` on all ``arguments`` at once, one process each; all start together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(arguments))
    queue = context.Queue()
    workers = [context.Process(target=_work, args=(function, item, barrier, queue)) for item in arguments]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    return results


def _work(function: Callable[..., Any], arguments: tuple, barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    barrier.wait()
    queue.put(function(*arguments))


def random_dataset(folder: Path, chunks: int, seq_length: int, vocab_size: int) -> ChunkDataset:
    """Write full chunks of random ids; 0 (end of a document) does not occur."""
    ids = np.random.default_rng(0).integers(1, vocab_size, size=(chunks, seq_length + 1))
    return write_chunk_dataset(folder, ids, plain_tokenizer_info(vocab_size, 0), seq_length)
