"""``cache_teacher_logits``: keep a few ids of a teacher's distribution for every token of a dataset.

    torchrun --nproc-per-node 2 tools/cache_teacher_logits.py data.path=CORPUS teacher.path=RUN output=CACHE

    chunks → teacher's forward pass → (last pipeline stage) ids of the codec → thread: records → shard files

Replicas of the teacher take shards as they become free. A killed run resumes at the last commit of each shard in
``<output>.partial``, on any number of replicas. Micro-batch m of a shard holds its chunks [m·b, (m + 1)·b) whatever the
layout and wherever a run resumes, so the bytes are the same.
"""

import logging
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.checkpoints.weights import LoadedModel, load_for_inference
from megatron_kd.config import to_mapping
from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import CheckpointError
from megatron_kd.logs import progress_bar
from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.models.parameters import weights_fingerprint
from megatron_kd.parallel.coordination import WorkQueue, on_main_rank
from megatron_kd.parallel.groups import is_last_stage
from megatron_kd.parallel.runtime import Runtime, distributed_runtime
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.cache.cache_reader import INDEX_DTYPE, KIND, LogitCache, View, token_hash
from megatron_kd.teachers.cache.cache_writer import Commit, ShardWriter, UnfinishedCache
from megatron_kd.teachers.cache.codec import LARGEST_VOCABULARY, Codec, Entries
from megatron_kd.teachers.cache.sparsifier import Sparsifier
from megatron_kd.teachers.routing import whole_sequence
from megatron_kd.teachers.teacher_config import CacheTeacherLogitsConfig

logger = logging.getLogger(__name__)

LONGEST_WAIT_MINUTES = 24 * 60.0
"""How long replicas without a shard wait for those that still have one."""
MICRO_BATCHES_PER_SCHEDULE = 8
MOST_WAITING = 4
"""Micro-batches by which encoding and writing may lag behind the forward passes."""
MOST_CHUNKS_PER_SHARD = 8192
SHARDS_OF_A_SMALL_DATASET = 16


def run(config: CacheTeacherLogitsConfig) -> Path:
    """Write the cache and return its folder.

    Raises:
        DataError: the dataset is damaged, the output is something else, or a logit is not finite.
        CheckpointError: the teacher is missing, damaged, or reads other ids than the dataset holds.
    """
    with distributed_runtime(LONGEST_WAIT_MINUTES) as runtime:
        dataset = ChunkDataset.open(config.data.path)
        model = ScoredModelConfig(config.teacher.path, config.teacher.layer_spec, config.teacher.precision)
        loaded = load_for_inference(model, config.parallel, dataset, runtime)
        fingerprint = weights_fingerprint(loaded.model_chunks, loaded.groups.intra_dist_opt)
        settings = _settings(config, dataset, loaded, fingerprint)
        if not on_main_rank(lambda: _is_made(config, settings)):
            _cache(config, dataset, loaded, settings, runtime)
    return Path(config.output)


def _settings(
    config: CacheTeacherLogitsConfig, dataset: ChunkDataset, loaded: LoadedModel, fingerprint: str
) -> dict[str, Any]:
    """Return everything that decides the cache's bytes; the number of replicas does not."""
    vocab_size = loaded.info.architecture.vocab_size
    if vocab_size > LARGEST_VOCABULARY:
        raise CheckpointError(
            f"{loaded.info.path}: has {vocab_size} ids, a cache has room for {LARGEST_VOCABULARY}: use another teacher"
        )
    precision = config.teacher.precision or loaded.info.manifest["precision"]
    return {
        "dataset": dataset.fingerprint,
        "teacher": fingerprint,
        "codec": Codec.build(config.codec, config, vocab_size).to_mapping(),
        "view": View(config.temperature, precision).to_mapping(),
        "micro_batch_size": config.micro_batch_size,
        "chunks_per_shard": ShardPlan.of(dataset.num_chunks, config.chunks_per_shard).chunks_per_shard,
        "layout": f"TP{loaded.layout.tensor} PP{loaded.layout.pipeline}" + " SP" * loaded.layout.sequence_parallel,
    }


def _is_made(config: CacheTeacherLogitsConfig, settings: dict[str, Any]) -> bool:
    if not already_made(config.output, KIND, recipe_of(settings)):
        return False
    LogitCache.open(config.output)
    logger.info(f"{config.output}: already made from this dataset and teacher")
    return True


def _cache(
    config: CacheTeacherLogitsConfig,
    dataset: ChunkDataset,
    loaded: LoadedModel,
    settings: dict[str, Any],
    runtime: Runtime,
) -> None:
    plan = ShardPlan.of(dataset.num_chunks, config.chunks_per_shard)
    with WorkStore(config.output, settings) as store:
        cache = UnfinishedCache(store, plan.num_shards)
        on_main_rank(store.claim)
        if on_main_rank(cache.publish_if_whole):
            return
        name, commits = on_main_rank(lambda: (secrets.token_hex(8), cache.commits()))
        done = sum(commit.chunks for commit in commits.values())
        if done and runtime.is_main:
            logger.info(f"{done:,} of {dataset.num_chunks:,} chunks were done before")
        todo = [n for n in range(plan.num_shards) if n not in commits or not commits[n].complete]
        queue = WorkQueue(todo, name, loaded.groups, runtime.device)
        codec = Codec.from_mapping(settings["codec"])
        with ShardFiller(store, dataset, loaded, codec, config, runtime.device) as filler:
            _fill(queue, plan, filler, commits, done, runtime)
            dist.barrier()
            on_main_rank(lambda: _finish(config, dataset, loaded, settings, cache))


def _fill(
    queue: WorkQueue,
    plan: "ShardPlan",
    filler: "ShardFiller",
    commits: dict[int, Commit],
    done: int,
    runtime: Runtime,
) -> None:
    """Write the shards that this replica is given."""
    with progress_bar(plan.num_chunks, "cache", "chunk", initial=done, shown=runtime.is_main) as bar:
        for number in queue:
            replicas = min(max(1, queue.num_taken()), runtime.world_size // max(1, filler.replica_size))
            first, last = plan.chunk_range(number)
            for chunks in filler.shard(number, first, last, commits.get(number)):
                bar.update(min(chunks * replicas, plan.num_chunks - bar.n))
        bar.update(plan.num_chunks - bar.n)


def _finish(
    config: CacheTeacherLogitsConfig,
    dataset: ChunkDataset,
    loaded: LoadedModel,
    settings: dict[str, Any],
    cache: UnfinishedCache,
) -> None:
    teacher = {
        "path": str(loaded.info.path),
        "fingerprint": settings["teacher"],
        "parameters": loaded.info.architecture.parameters,
    }
    producer = {
        "tool": "cache_teacher_logits", "config": to_mapping(config), "recipe": recipe_of(settings),
        "settings": settings,
    }  # fmt: skip
    facts = {"codec": settings["codec"], "view": settings["view"], "teacher": teacher}
    cache.finish(dataset, facts, producer)
    manifest = LogitCache.open(config.output).manifest
    logger.info(
        f"{manifest['tokens']:,} tokens in {config.output}, "
        f"{manifest['ids_per_token']} ids and {manifest['bytes_per_token']} bytes per token"
    )


@dataclass(frozen=True)
class ShardPlan:
    """Which chunks each shard holds; the same for every layout."""

    num_chunks: int
    chunks_per_shard: int

    @classmethod
    def of(cls, num_chunks: int, chunks_per_shard: int | None) -> "ShardPlan":
        """Plan the shards of a dataset; None chooses shards that are small enough to be shared out among ranks."""
        if chunks_per_shard is None:
            chunks_per_shard = min(MOST_CHUNKS_PER_SHARD, max(1, -(-num_chunks // SHARDS_OF_A_SMALL_DATASET)))
        return cls(num_chunks, chunks_per_shard)

    @property
    def num_shards(self) -> int:
        """Number of shards, each a pair of files."""
        return -(-self.num_chunks // self.chunks_per_shard)

    def chunk_range(self, number: int) -> tuple[int, int]:
        """Return the first chunk of a shard, and the one after its last."""
        first = number * self.chunks_per_shard
        return first, min(first + self.chunks_per_shard, self.num_chunks)


@dataclass(frozen=True)
class ChunkRows:
    """The chunks of a micro-batch: for each the positions that count, bool [n], a hash of its ids, and its root id."""

    present: list[np.ndarray]
    hashes: list[int]
    root_ids: np.ndarray

    @classmethod
    def of(cls, batch: Batch, lengths: np.ndarray, root_ids: np.ndarray) -> "ChunkRows":
        """Read them off a batch on the CPU whose first ``len(lengths)`` rows are chunks of ``lengths`` ids."""
        positions = [int(length) - 1 for length in lengths]
        return cls(
            present=[batch.loss_mask[row, :n].numpy() > 0 for row, n in enumerate(positions)],
            hashes=[token_hash(batch.tokens[row], batch.labels[row], n) for row, n in enumerate(positions)],
            root_ids=root_ids,
        )

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return root chunk id and place in the chunk of every position that counts, chunk after chunk."""
        places = [np.flatnonzero(present) for present in self.present]
        owners = np.repeat(self.root_ids, [len(place) for place in places])
        return owners, np.concatenate(places)

    def records(self, codec: Codec, entries: Entries) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the record of every chunk, and the index of all, whose ``end`` the shard fills in."""
        records, index = [], np.zeros(len(self.present), dtype=INDEX_DTYPE)
        ends = np.concatenate([[0], np.cumsum(entries.counts)])
        at = 0
        for row, present in enumerate(self.present):
            stop = at + int(present.sum())
            kept = slice(int(ends[at]), int(ends[stop]))
            records.append(codec.encode(present, entries.part(at, stop, kept)))
            index[row] = (self.hashes[row], 0, len(present), stop - at, kept.stop - kept.start)
            at = stop
        return records, index


class ShardFiller:
    """Fills shards with what one replica of the teacher gives.

    Args:
        store: the cache under construction.
        dataset: the chunks.
        loaded: the teacher.
        codec: what is kept.
        config: temperature of the distribution, rows of a forward pass, time between commits.
    """

    def __init__(
        self,
        store: WorkStore,
        dataset: ChunkDataset,
        loaded: LoadedModel,
        codec: Codec,
        config: CacheTeacherLogitsConfig,
        device: torch.device,
    ) -> None:
        self._store, self._dataset, self._loaded, self._codec = store, dataset, loaded, codec
        self._rows, self._commit_seconds, self._device = config.micro_batch_size, config.commit_seconds, device
        groups = loaded.groups
        self.replica_size = groups.mp.size()
        self._sparsifier = None
        if is_last_stage(groups):
            head = loaded.model_chunks[-1].output_head()
            self._sparsifier = Sparsifier(codec, head, groups.tp, config.temperature)
        self._writes = self._sparsifier is not None and groups.tp.rank() == 0
        self._thread = ThreadPoolExecutor(1, "cache writer")
        self._waiting: deque[Future] = deque()

    def __enter__(self) -> "ShardFiller":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def shard(self, number: int, first: int, last: int, commit: Commit | None) -> Iterator[int]:
        """Write the chunks ``[first, last)`` of a shard, from its commit on; yield how many are done each time."""
        writer = ShardWriter(self._store, number, commit, self._commit_seconds) if self._writes else None
        start = first + (commit.chunks if commit else 0)
        try:
            for window in range(start, last, self._rows * MICRO_BATCHES_PER_SCHEDULE):
                stop = min(last, window + self._rows * MICRO_BATCHES_PER_SCHEDULE)
                self._pass(range(window, stop, self._rows), last, writer)
                yield stop - window
            if writer is not None:
                while self._waiting:
                    self._waiting.popleft().result()
                writer.commit(complete=True)
        finally:
            if writer is not None:
                writer.close()

    def _pass(self, starts: range, last: int, writer: ShardWriter | None) -> None:
        items = [self._read(start, min(start + self._rows, last)) for start in starts]
        forward_only(
            self._loaded.model_chunks,
            self._loaded.groups,
            lambda item: (item[0].tokens, item[0].position_ids),
            lambda item, hidden: self._collect(item[1], item[2], hidden, writer),
            items,
            seq_length=self._dataset.seq_length,
            micro_batch_size=self._rows,
        )

    def _read(self, start: int, stop: int) -> tuple[Batch, ChunkRows, Tensor]:
        """Read a micro-batch, padded with copies of its last chunk, and the mask [b, s] of the positions that count."""
        indices = np.minimum(np.arange(start, start + self._rows), stop - 1)
        batch = make_batch(self._dataset, indices, self._dataset.seq_length)
        rows = ChunkRows.of(batch, self._dataset.lengths[start:stop], self._dataset.root_ids(np.arange(start, stop)))
        counted = batch.loss_mask > 0
        counted[stop - start :] = False
        return batch.to(self._device), rows, counted.to(self._device)

    def _collect(self, rows: ChunkRows, counted: Tensor, hidden: Tensor, writer: ShardWriter | None) -> None:
        assert self._sparsifier is not None
        hidden = whole_sequence(hidden, self._loaded.model_chunks[-1], self._loaded.groups)
        entries = self._sparsifier(hidden.transpose(0, 1)[counted], *rows.tokens())
        if writer is not None:
            while len(self._waiting) >= MOST_WAITING:
                self._waiting.popleft().result()
            self._waiting.append(self._thread.submit(self._write, writer, rows, entries))

    def _write(self, writer: ShardWriter, rows: ChunkRows, entries: Entries) -> None:
        writer.add(*rows.records(self._codec, entries))
