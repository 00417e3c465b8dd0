"""Pairs that the cache benchmark runs alternately: a teacher's pass and its caching; steps without and with a cache."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.cache_parts import random_dataset
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.checkpoints.weights import LoadedModel
from megatron_kd.config import from_mapping
from megatron_kd.data.batch import make_batch
from megatron_kd.losses.tile_buffers import HeadLogits
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.models.gpt import build_model
from megatron_kd.models.parameters import initialize_weights
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.cache.codec import Codec
from megatron_kd.teachers.cache_teacher_logits import ShardFiller
from megatron_kd.teachers.cached import CachedTeacher
from megatron_kd.teachers.teacher_config import CacheTeacherLogitsConfig, TeacherConfig
from megatron_kd.training.methods.method_builders import MethodParts, build_losses
from megatron_kd.training.objective import FusedLoss, MicroBatchLoss
from megatron_kd.training.optimizer import build_optimizer
from megatron_kd.training.train_config import TrainConfig
from megatron_kd.training.train_step import TrainStep
from megatron_kd.training.training_run import build_student
from tests.reference.one_rank import training_run

SEQ_LENGTH = 256
ROWS = 2
STUDENT, STUDENT_VOCABULARY, STUDENT_ROWS, STUDENT_LENGTH = "qwen_21m", 32_000, 4, 512


@contextmanager
def caching_sides(folder: Path, codec: Codec, chunks: int) -> Iterator[tuple[Callable, Callable]]:
    """Yield a 104M teacher's forward pass with its output layer, and writing the same chunks into a shard."""
    dataset = random_dataset(folder / "data", chunks, SEQ_LENGTH, codec.vocab_size)
    store = WorkStore(folder / "written", {})
    store.claim()
    architecture = architecture_by_name("qwen_104m")
    with distributed_runtime() as runtime:
        layout = ParallelLayout.for_world(ParallelConfig(), 1)
        groups = create_process_groups(layout)
        model = build_model(
            architecture, layout, groups, precision="fp32", device=runtime.device, max_sequence_length=SEQ_LENGTH
        )
        initialize_weights(model[0], architecture.init_std, 0)
        model[0].eval()
        loaded = LoadedModel(model, groups, layout, None)  # type: ignore[arg-type]
        logits = HeadLogits(model[0].output_head(), 0, codec.vocab_size)
        buffer = torch.empty(ROWS * SEQ_LENGTH, codec.vocab_size)
        batches = [make_batch(dataset, np.arange(i, i + ROWS), SEQ_LENGTH) for i in range(0, chunks, ROWS)]

        def alone() -> None:
            forward_only(
                model, groups, lambda batch: (batch.tokens, batch.position_ids),
                lambda _, hidden: logits.product(hidden.flatten(0, 1), buffer), batches,
                seq_length=SEQ_LENGTH, micro_batch_size=ROWS,
            )  # fmt: skip

        numbers = itertools.count()
        keys = {"data": {"path": "-"}, "teacher": {"path": "-"}, "output": "-", "micro_batch_size": ROWS}
        config = from_mapping(CacheTeacherLogitsConfig, {**keys, "commit_seconds": 60.0}, "benchmark")
        with ShardFiller(store, dataset, loaded, codec, config, runtime.device) as filler:

            def caching() -> None:
                for _ in filler.shard(next(numbers), 0, chunks, None):
                    pass

            yield alone, caching


@contextmanager
def step_sides(folder: Path, codec_name: str) -> Iterator[tuple[Callable, Callable]]:
    """Yield a training step on the LM loss, and one with a cached teacher, of the same student on the same chunks."""
    from tests.reference.caches import write_cache

    dataset = random_dataset(folder / "data", 32, STUDENT_LENGTH, STUDENT_VOCABULARY)
    codec = Codec.build(codec_name, TeacherConfig(), STUDENT_VOCABULARY)
    cache = write_cache(dataset, folder / "cache", codec)
    tree = {
        "data": {"path": str(dataset.path)}, "output": "unused", "model": {"name": STUDENT},
        "training": {"global_batch_size": STUDENT_ROWS, "micro_batch_size": STUDENT_ROWS},
    }  # fmt: skip
    config = from_mapping(TrainConfig, tree, "benchmark")
    teacher = {"placement": "cached", "cache_path": "-"}
    distilling = {**tree, "teacher": teacher, "distillation": {"method": "vanilla_kd"}}
    architecture = architecture_by_name(STUDENT).with_vocab_size(STUDENT_VOCABULARY)
    with distributed_runtime() as runtime:
        layout = ParallelLayout.for_world(ParallelConfig(), 1)
        groups = create_process_groups(layout)
        run = training_run(config, dataset, runtime, architecture=architecture)
        model = build_student(run, groups)
        optimizer = build_optimizer(config.optimizer, model, groups, bf16=False)
        cached = CachedTeacher(cache, dataset, codec.target_kind("auto", "benchmark"))
        settings = from_mapping(TrainConfig, distilling, "benchmark")
        order = itertools.cycle(np.random.default_rng(0).permutation(32).reshape(-1, STUDENT_ROWS))

        def side(teacher: CachedTeacher | None) -> Callable[[], None]:
            side_run = dataclasses.replace(run, config=settings if teacher else config)
            losses = build_losses(MethodParts(side_run, groups, model, teacher, FusedLoss(groups)))
            step = TrainStep(
                model=model, optimizer=optimizer, groups=groups, teacher=teacher, clip_grad=1.0,
                micro_batch_loss=MicroBatchLoss(losses, teacher),
            )  # fmt: skip
            return lambda: [step([make_batch(dataset, next(order), STUDENT_LENGTH)], 1e-4) for _ in range(2)]

        yield side(None), side(cached)
