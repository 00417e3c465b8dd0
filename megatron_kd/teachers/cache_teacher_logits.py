"""``cache_teacher_logits``: what a teacher says about every chunk of a dataset, into a teacher cache.

torchrun --nproc-per-node 2 tools/cache_teacher_logits.py data.path=CORPUS teacher.path=RUN codec=sampled output=CACHE

Replicas of the teacher take shards as they get free. A run that was killed resumes at the last commit of each shard
in ``<output>.partial``, on any number of replicas, and gives the same bytes.
"""

import logging
import secrets
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.checkpoints.weights import LoadedModel, load_for_inference
from megatron_kd.config import to_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.models.parameters import weights_fingerprint
from megatron_kd.parallel.coordination import WorkQueue, on_main_rank
from megatron_kd.parallel.runtime import Runtime, distributed_runtime
from megatron_kd.teachers.cache.cache_reader import KIND, LogitCache, View
from megatron_kd.teachers.cache.cache_writer import Commit, ShardFiller, ShardPlan
from megatron_kd.teachers.cache.codec import LARGEST_VOCABULARY, Codec
from megatron_kd.teachers.cache.unfinished_cache import UnfinishedCache
from megatron_kd.teachers.teacher_config import CacheTeacherLogitsConfig

logger = logging.getLogger(__name__)

LONGEST_WAIT_MINUTES = 24 * 60.0
"""Replicas that have run out of shards wait for those that have not."""


def run(config: CacheTeacherLogitsConfig) -> Path:
    """Write the cache and return its folder.

    Raises:
        DataError: the dataset is damaged, the output is something else, or a logit is not finite.
        CheckpointError: the teacher is missing, damaged, or reads other ids.
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
    """Everything that decides the cache's bytes. How many replicas take part does not."""
    precision = config.teacher.precision or loaded.info.manifest["precision"]
    return {
        "dataset": dataset.fingerprint,
        "teacher": fingerprint,
        "codec": Codec.build(config.codec, config, _checked_vocabulary(loaded)).to_mapping(),
        "view": View(config.temperature, precision).to_mapping(),
        "micro_batch_size": config.micro_batch_size,
        "chunks_per_shard": ShardPlan.of(dataset.num_chunks, config.chunks_per_shard).chunks_per_shard,
        "layout": f"TP{loaded.layout.tensor} PP{loaded.layout.pipeline}" + " SP" * loaded.layout.sequence_parallel,
    }


def _checked_vocabulary(loaded: LoadedModel) -> int:
    vocab_size = loaded.info.architecture.vocab_size
    if vocab_size > LARGEST_VOCABULARY:
        raise CheckpointError(f"{loaded.info.path}: {vocab_size} ids; a cache has room for {LARGEST_VOCABULARY}")
    return vocab_size


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
    with WorkStore(config.output, settings) as store, ExitStack() as stack:
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
        filler = stack.enter_context(ShardFiller(
            store, dataset, loaded, codec, config.temperature, config.micro_batch_size, config.commit_seconds,
            runtime.device,
        ))  # fmt: skip
        _fill(queue, plan, filler, commits, done, runtime)
        dist.barrier()
        on_main_rank(lambda: _finish(config, dataset, loaded, settings, cache))


def _fill(
    queue: WorkQueue, plan: ShardPlan, filler: ShardFiller, commits: dict[int, Commit], done: int, runtime: Runtime
) -> None:
    """Write the shards that this replica is given."""
    with tqdm(
        total=plan.num_chunks,
        initial=done,
        desc="cache",
        unit="chunk",
        unit_scale=True,
        disable=not runtime.is_main,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    ) as bar:
        for number in queue:
            replicas = min(max(1, queue.num_taken()), runtime.world_size // max(1, filler.replica_size))
            first, last = plan.chunk_range(number)
            for chunks in filler.shard(number, first, last, commits.get(number)):
                bar.update(min(chunks * replicas, bar.total - bar.n))
        bar.update(bar.total - bar.n)


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
        f"{manifest['tokens']:,} tokens into {config.output}, "
        f"{manifest['ids_per_token']} ids and {manifest['bytes_per_token']} bytes a token"
    )
