"""Caches of made-up knowledge, written by the parts that the tool writes with, without a model."""

from pathlib import Path

import numpy as np

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.data.batch import make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.teachers.cache.cache_reader import LogitCache, View
from megatron_kd.teachers.cache.cache_writer import ShardWriter, UnfinishedCache
from megatron_kd.teachers.cache.codec import Codec, Entries
from megatron_kd.teachers.cache.codecs import SampledCodec
from megatron_kd.teachers.cache_teacher_logits import ChunkRows, ShardPlan


def random_entries(codec: Codec, rows: int, chance: np.random.Generator, mean_ids: float | None = None) -> Entries:
    """Entries that the codec could have chosen. ``sampled``: about ``mean_ids`` distinct ids a position."""
    most = min(codec.max_ids, codec.vocab_size)
    if codec.fixed_count:
        counts = np.full(rows, most)
    else:
        counts = chance.integers(1, most + 1, rows)
        if mean_ids is not None:
            counts = np.clip(chance.poisson(mean_ids - 1, rows) + 1, 1, most)
    total, starts = int(counts.sum()), np.cumsum(counts) - counts
    places = np.arange(total) - np.repeat(starts, counts)
    first = chance.integers(0, codec.vocab_size, rows)
    ids = (np.repeat(first, counts) + places * max(1, codec.vocab_size // (most + 1))) % codec.vocab_size
    falling = np.exp(-places * np.repeat(chance.uniform(0.01, 2.0, rows), counts))
    held = chance.uniform(0.3, 1.0, rows)
    probabilities = falling * np.repeat(held / np.add.reduceat(falling, starts) if rows else held, counts)
    columns = {"probabilities": probabilities.astype(np.float32)}
    if isinstance(codec, SampledCodec):
        draws = np.ones(total, dtype=np.uint16)
        draws[starts] += (codec.max_ids - counts).astype(np.uint16)
        columns = {"draws": draws}
        if codec.is_weighted:
            columns["importance"] = chance.lognormal(0, 1, total).astype(np.float32)
    return Entries(counts.astype(np.int64), ids.astype(np.uint32), (1 - held).astype(np.float32), columns)


def write_cache(
    dataset: ChunkDataset,
    output: Path,
    codec: Codec,
    view: View | None = None,
    chunks_per_shard: int | None = None,
    seed: int = 0,
) -> LogitCache:
    """A whole cache of random knowledge about every chunk of ``dataset``."""
    settings = {"dataset": dataset.fingerprint, "seed": seed}
    store, chance = WorkStore(output, settings), np.random.default_rng(seed)
    plan = ShardPlan.of(dataset.num_chunks, chunks_per_shard)
    store.claim()
    for number in range(plan.num_shards):
        first, last = plan.chunk_range(number)
        indices = np.arange(first, last)
        batch = make_batch(dataset, indices, dataset.seq_length)
        rows = ChunkRows.of(batch, dataset.lengths[indices], dataset.root_ids(indices))
        writer = ShardWriter(store, number, None, commit_seconds=60)
        writer.add(*rows.records(codec, random_entries(codec, len(rows.tokens()[0]), chance)))
        writer.commit(complete=True)
        writer.close()
    facts = {
        "codec": codec.to_mapping(),
        "view": (view or View(1.0, "fp32")).to_mapping(),
        "teacher": {"path": "made up", "fingerprint": f"{seed:032x}"},
    }
    cache = UnfinishedCache(store, plan.num_shards)
    cache.finish(dataset, facts, {"tool": "write_cache", "settings": settings, "recipe": "none"})
    return LogitCache.open(output)
