"""The training loop: batches in order, steps, metrics, evaluation, checkpoints."""

import dataclasses
import time
from pathlib import Path
from typing import Any, Iterator, Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.loader import BatchSchedule, ChunkOrder
from megatron_kd.data.prefetch import prefetch
from megatron_kd.errors import NonFiniteLossError
from megatron_kd.metrics.tracker import RunTracker
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.weights import open_checkpoint
from megatron_kd.parallel.layout import ParallelLayout, as_mapping
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.planning.flops import training_flops
from megatron_kd.scoring.chunk_losses import heldout_loss
from megatron_kd.training.build import unwrap
from megatron_kd.training.checkpoint import Progress, save_checkpoint
from megatron_kd.training.config import TrainConfig
from megatron_kd.training.optimizer import learning_rate
from megatron_kd.training.train_step import StepResult, TrainStep


class Trainer:
    """The loop: batches in order, steps, metrics, evaluation, checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        folder: Path,
        data: ChunkDataset,
        heldout: ChunkDataset | None,
        architecture: ModelArchitecture,
        layout: ParallelLayout,
        groups: ProcessGroupCollection,
        model: list[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        step: TrainStep,
    ):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.data, self.heldout = data, heldout
        self.architecture, self.layout, self.groups = architecture, layout, groups
        self.model, self.optimizer, self.step = model, optimizer, step
        self.schedule = BatchSchedule(
            ChunkOrder(data.num_chunks, seed=config.training.seed, shuffle=config.data.shuffle),
            config.training.global_batch_size,
        )
        teacher = open_checkpoint(config.teacher.path).architecture.parameters if step.teacher is not None else 0
        self.flops_per_token = training_flops(architecture.parameters, 1, config.distillation.method, teacher)

    def run(self, progress: Progress) -> None:
        """Train from ``progress`` to the end."""
        settings, first_step = self.config.training, progress.step
        tracker = RunTracker(
            self.folder, settings.train_iters, progress.step, self.runtime.is_main, self.config.model.name
        )
        try:
            for batches in prefetch(lambda: self._batches(first_step), depth=2):
                progress = self._train_one(batches, progress, tracker)
                if _is_due(progress.step, settings.eval_interval, settings.train_iters):
                    self._evaluate(progress, tracker)
                if _is_due(progress.step, settings.save_interval, settings.train_iters):
                    tracker.flush()
                    self._save(progress)
        finally:
            tracker.close()

    def _train_one(self, batches: Sequence[Batch], progress: Progress, tracker: RunTracker) -> Progress:
        started = time.perf_counter()
        rate = learning_rate(progress.step, self.config.optimizer, self.config.training.train_iters)
        try:
            result = self.step([batch.to(self.runtime.device) for batch in batches], rate)
        except NonFiniteLossError as error:
            chunks = self.schedule.chunks(progress.step).tolist()
            raise NonFiniteLossError(f"step {progress.step + 1}: {error}; chunks of the batch: {chunks}") from None
        seconds = time.perf_counter() - started
        progress = Progress(progress.step + 1, progress.tokens + result.tokens, progress.seconds + seconds)
        tracker.step(self._row(progress, result, rate, seconds))
        return progress

    def _row(self, progress: Progress, result: StepResult, rate: float, seconds: float) -> dict[str, Any]:
        settings = self.config.training
        positions = settings.global_batch_size * self._seq_length
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "lm_loss": result.lm_loss,
            "kd_loss": result.kd_loss,
            "teacher_entropy": result.teacher_entropy,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "step_seconds": seconds,
            "tokens_per_second": positions / seconds,
            "tflops_per_second": self.flops_per_token * positions / seconds / 1e12,
            "train_flops": self.flops_per_token * positions * progress.step,
            "seconds": progress.seconds,
        }

    def _evaluate(self, progress: Progress, tracker: RunTracker) -> None:
        if self.heldout is None:
            return
        self._gather_parameters()
        chunks = [unwrap(chunk) for chunk in self.model]
        totals = heldout_loss(
            chunks,
            self.groups,
            self.heldout,
            device=self.runtime.device,
            micro_batch_size=self.config.training.micro_batch_size,
        )
        positions = self.config.training.global_batch_size * self._seq_length
        tracker.evaluation(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "eval_loss": totals.loss,
                "bits_per_byte": totals.bits_per_byte,
                "eval_tokens": totals.tokens,
                "train_flops": self.flops_per_token * positions * progress.step,
            }
        )

    def _gather_parameters(self) -> None:
        """Under overlapped gathering a rank has only its own part of the update until the next forward pass."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def _save(self, progress: Progress) -> None:
        self._gather_parameters()
        save_checkpoint(
            self.folder / "checkpoints",
            progress,
            self.model,
            self.optimizer,
            self.groups,
            architecture=self.architecture,
            keep=self.config.training.keep_checkpoints,
            about={
                "tokenizer_hash": self.data.tokenizer_hash,
                "tokenizer_path": str(self.data.tokenizer_path.absolute()),
                "eos_id": self.data.eos_id,
                "dataset_fingerprint": self.data.fingerprint,
                "dataset_path": self.config.data.path,
                "seq_length": self._seq_length,
                "precision": self.config.training.precision,
                "layout": as_mapping(self.layout),
                "config": dataclasses.asdict(self.config),
            },
        )

    def _batches(self, first_step: int) -> Iterator[list[Batch]]:
        settings = self.config.training
        for step in range(first_step, settings.train_iters):
            rows = self.schedule.micro_batches(
                step, self.groups.dp.rank(), self.groups.dp.size(), settings.micro_batch_size
            )
            yield [make_batch(self.data, indices, self._seq_length) for indices in rows]

    @property
    def _seq_length(self) -> int:
        return self.config.data.seq_length or self.data.seq_length


def _is_due(step: int, interval: int | None, last: int) -> bool:
    return step == last or bool(interval and step % interval == 0)
