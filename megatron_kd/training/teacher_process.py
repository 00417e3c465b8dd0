"""What ``train`` does on the ranks of a remote teacher: the same data and schedule as the student's, no training."""

import signal
import threading
from contextlib import contextmanager
from typing import Iterator

import torch

from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.blend import order_of
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_order import BatchSchedule
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.teachers.placements import build_teacher_ranks, plan_teacher
from megatron_kd.training.preflight import check_teacher_ranks
from megatron_kd.training.setup import open_datasets, student_architecture, student_run
from megatron_kd.training.train_config import TrainConfig
from megatron_kd.training.watchdogs import STOP_SIGNALS


class StudentsBatches:
    """The micro-batches of the student's data-parallel ranks, read from the dataset by the same schedule."""

    def __init__(self, config: TrainConfig, data: ChunkDataset, layout: ParallelLayout):
        settings = config.training
        self._data, self._ranks, self._rows = data, layout.data, settings.micro_batch_size
        self._seq_length = config.data.seq_length or data.seq_length
        self._mask_prompt = config.data.mask_prompt
        self._schedule = build_schedule(config, data)
        self.micro_batches = layout.micro_batches(settings.global_batch_size, settings.micro_batch_size)

    def read(self, position: int, data_rank: int, micro_batch: int) -> Batch:
        """Read one micro-batch of the global batch at ``position``."""
        rows = self._schedule.micro_batches(position, data_rank, self._ranks, self._rows)
        return make_batch(self._data, rows[micro_batch], self._seq_length, self._mask_prompt)

    def root_ids(self, batch: Batch) -> torch.Tensor:
        """Return the ids, int64 [b], of a batch's chunks in the root of the dataset."""
        return torch.from_numpy(self._data.root_ids(batch.chunk_indices.numpy()).astype("int64"))


def build_schedule(config: TrainConfig, data: ChunkDataset) -> BatchSchedule:
    """Which chunks each global batch holds."""
    order = order_of(data, config.training.seed, config.data.shuffle)
    return BatchSchedule(order, config.training.global_batch_size)


def run_teacher_ranks(config: TrainConfig, runtime: Runtime) -> None:
    """Serve the student until it has finished."""
    with signals_left_to_the_student():
        _serve(config, runtime)


@contextmanager
def signals_left_to_the_student() -> Iterator[None]:
    """A scheduler's signals reach all ranks: the student's save and tell the teacher's to stop."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(config: TrainConfig, runtime: Runtime) -> None:
    assert runtime.split is not None
    data, _ = open_datasets(config)
    layout = ParallelLayout.for_world(config.parallel, runtime.split.num_students)
    run = student_run(config, student_architecture(config, data), data, layout, runtime)
    plan = plan_teacher(config.teacher, run)
    check_teacher_ranks(config, plan.layout, plan.info.architecture, run.seq_length, runtime.device)
    build_teacher_ranks(config.teacher, run, plan, StudentsBatches(config, data, layout)).run()
