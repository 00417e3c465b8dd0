"""The training loop: batches in order, steps, metrics, evaluation, checkpoints, and what it does when trouble comes."""

import dataclasses
import itertools
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Iterator, Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.checkpoints.checkpoint_writer import CheckpointWriter, Retention
from megatron_kd.checkpoints.weights import open_checkpoint
from megatron_kd.config import to_mapping
from megatron_kd.costs.flops import RunCost
from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.workers import prefetch
from megatron_kd.errors import NonFiniteLossError, Preempted
from megatron_kd.metrics.device import MemoryMeter, peak_flops
from megatron_kd.metrics.tracker import RunTracker
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelLayout, as_mapping
from megatron_kd.parallel.mcore_patches.remedies import gather_parameters
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.scoring.chunk_losses import HeldoutLoss, heldout_loss
from megatron_kd.teachers.interface import Action, Decision
from megatron_kd.teachers.placements import build_heldout_teacher
from megatron_kd.training.checkpoint import (
    Progress,
    description,
    load_checkpoint,
    newest_whole_checkpoint,
    training_state,
)
from megatron_kd.training.distillation_config import METHODS_WITH_TEXT
from megatron_kd.training.fault_tolerance import FaultPolicy
from megatron_kd.training.methods.source import BatchSource, Place, restore_source, source_files
from megatron_kd.training.objective import build_objective, pretraining_uses_teacher
from megatron_kd.training.optimizer import learning_rate
from megatron_kd.training.setup import student_run, unwrap
from megatron_kd.training.teacher_process import build_schedule
from megatron_kd.training.train_config import TrainConfig
from megatron_kd.training.train_step import StepResult, TrainStep
from megatron_kd.training.validation import heldout_distillation
from megatron_kd.training.watchdogs import HangWatchdog, StopSignals


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
        source: BatchSource,
    ):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.data, self.heldout = data, heldout
        self.architecture, self.layout, self.groups = architecture, layout, groups
        self.model, self.optimizer, self.step, self.source = model, optimizer, step, source
        self.schedule = build_schedule(config, data)
        run = student_run(config, architecture, data, layout, runtime)
        self.heldout_teacher = build_heldout_teacher(config.teacher, run, groups, step.teacher, heldout)
        self.memory = MemoryMeter(runtime.device)
        self.peak_flops = peak_flops(runtime.device, config.metrics.peak_tflops)
        runs = config.teacher.runs_a_model
        teacher = open_checkpoint(config.teacher.path).architecture.parameters if runs else 0
        method = config.distillation.method if runs else "none"  # what a cache took is counted where it was made
        self.cost = RunCost(
            method=method,
            student_parameters=architecture.parameters,
            teacher_parameters=teacher,
            positions=config.training.global_batch_size * self._seq_length,
            seq_length=self._seq_length,
            has_pretraining=config.distillation.pretraining_weight > 0,
            pretraining_has_teacher=pretraining_uses_teacher(config.distillation),
        )

    def run(self, progress: Progress) -> None:
        """Train from ``progress`` to the end.

        Raises:
            Preempted: a signal asked the run to stop; a checkpoint was written.
            NonFiniteLossError: a batch that the policy does not skip.
        """
        settings, first_position = self.config.training, progress.position
        self._saved_step: int | None = progress.step or None
        self._evaluated: dict[str, float] | None = None
        self.writer = CheckpointWriter(
            self.folder / "checkpoints", Retention(settings.keep_checkpoints, settings.keep_every)
        )
        with ExitStack() as stack:
            self.signals = stack.enter_context(StopSignals(self.config.fault_tolerance.exit_within_seconds))
            self.fault_policy = FaultPolicy(self.config.fault_tolerance, self.folder, self.runtime.is_main)
            self.watchdog = stack.enter_context(HangWatchdog(60.0 * self.config.fault_tolerance.hang_minutes))
            stack.callback(self.writer.abandon)
            stack.callback(lambda: self.tracker.close())
            self.tracker = self._open_tracker(progress)
            batches = stack.enter_context(closing(prefetch(lambda: self._batches(first_position), depth=2)))
            self._tell(Action.CONTINUE if progress.step < settings.train_iters else Action.STOP, progress)
            self._evaluate_before_the_first_step(progress)
            while progress.step < settings.train_iters:
                progress = self._advance(next(batches), progress)

    def _advance(self, batches: Sequence[Batch], progress: Progress) -> Progress:
        """One global batch and whatever is due after it."""
        settings, before = self.config.training, progress
        self.watchdog.beat(f"step {progress.step + 1}")
        progress, rolls_back = self._train_one(batches, progress)
        if rolls_back:
            return self._rewind(progress)
        has_stepped = progress.step > before.step
        if has_stepped and _is_due(progress.step, settings.eval_interval, settings.train_iters):
            self.watchdog.beat(f"evaluation after step {progress.step}")
            self._evaluate(progress)
        stops, writing = self.signals.agree(self.groups.intra_dist_opt, self.runtime.device, self.writer.is_writing)
        ended = progress.step == settings.train_iters
        is_due = has_stepped and _is_due(progress.step, settings.save_interval, settings.train_iters)
        if is_due or (stops and self._saved_step != progress.step):
            self._save(progress, in_background=not (stops or ended))
        elif stops or not writing:
            self.writer.finish()
        self._tell(Action.STOP if stops or ended else Action.CONTINUE, progress)
        if stops and not ended:
            raise Preempted(
                f"told to stop: step {progress.step} of {settings.train_iters} is saved in {self.folder}, the same "
                "command goes on from there"
            )
        return progress

    def _train_one(self, batches: Sequence[Batch], progress: Progress) -> tuple[Progress, bool]:
        """The progress after a step or a skipped batch, and whether its loss asks for a rollback."""
        started = time.perf_counter()
        rate = learning_rate(progress.step, self.config.optimizer, self.config.training.train_iters)
        chunks = self.schedule.chunks(progress.position).tolist()
        place = Place(progress.step, self.config.training.train_iters, progress.position)
        self._gather_parameters_for_text()
        try:
            made = self.source.batches(place, [batch.to(self.runtime.device) for batch in batches])
            measures = _is_due_now(progress.step + 1, self.config.metrics.kd_lm_gradient_ratio_interval)
            result = self.step(made.batches, rate, scheduled=made.scheduled, with_gradient_ratio=measures)
        except NonFiniteLossError as error:
            reason = f"{error}; chunks of the batch: {chunks}"
            faults = self.fault_policy.skip(progress.faults, progress.step + 1, reason)
            if faults is None:
                self.writer.finish()  # every rank sees the same loss, so all are here
                raise NonFiniteLossError(f"step {progress.step + 1}: {reason}") from None
            return dataclasses.replace(progress, faults=faults), False
        seconds = time.perf_counter() - started
        faults, rolls_back = self.fault_policy.after_loss(
            progress.faults,
            progress.step + 1,
            result.loss,
            chunks,
            has_checkpoint=self._saved_step is not None,
        )
        progress = Progress(progress.step + 1, progress.tokens + result.tokens, progress.seconds + seconds, faults)
        self.tracker.step(self._row(progress, result, rate, seconds) | made.facts)
        return progress, rolls_back

    def _rewind(self, progress: Progress) -> Progress:
        """Back to the newest checkpoint; the batches since then are passed over."""
        self._tell(Action.REWIND, progress)
        self.watchdog.beat(f"rollback after step {progress.step}")
        self.writer.finish()
        info = newest_whole_checkpoint(self.folder / "checkpoints")
        self._saved_step = info.manifest["progress"]["step"]
        restored = load_checkpoint(info, self.model, self.optimizer, self.groups)
        restore_source(self.source, info)
        faults = dataclasses.replace(
            progress.faults, skipped_batches=progress.position - restored.step, losses=restored.faults.losses
        )
        self.fault_policy.record(
            "rollback", progress.step, f"going on from step {restored.step} with global batch {progress.position}"
        )
        restored = dataclasses.replace(restored, faults=faults)
        self.tracker.close()
        self.tracker = self._open_tracker(restored)
        return restored

    def _tell(self, action: Action, progress: Progress) -> None:
        if self.step.teacher is not None:
            self.step.teacher.follow(Decision(action, progress.position, progress.step))

    def _open_tracker(self, progress: Progress) -> RunTracker:
        return RunTracker(
            self.folder,
            self.config.training.train_iters,
            progress.step,
            self.runtime.is_main,
            self.config.model.name,
            self.config.metrics,
            to_mapping(self.config),
        )

    def _row(self, progress: Progress, result: StepResult, rate: float, seconds: float) -> dict[str, Any]:
        settings = self.config.training
        positions = settings.global_batch_size * self._seq_length
        flops_per_second = self.cost.flops_per_token * positions / seconds
        devices = self.layout.world_size + self.config.teacher.own_ranks
        mfu = {"mfu": flops_per_second / (devices * self.peak_flops)} if self.peak_flops else {}
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
            "tflops_per_second": flops_per_second / 1e12,
            **mfu,
            "memory_bytes": self.memory.read(),
            "train_flops": self._flops(progress),
            "seconds": progress.seconds,
            **result.extra,
        }

    def _evaluate(self, progress: Progress) -> None:
        if self.heldout is None:
            return
        totals = self._heldout_totals()
        self.source.after_evaluation(totals.loss)
        self._evaluated = {"eval_loss": totals.loss, "bits_per_byte": totals.bits_per_byte, "tokens": totals.tokens}
        self.tracker.evaluation(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "eval_loss": totals.loss,
                "bits_per_byte": totals.bits_per_byte,
                "eval_tokens": totals.tokens,
                **self._evaluate_distillation(),
                "train_flops": self._flops(progress),
            }
        )

    def _evaluate_distillation(self) -> dict[str, float]:
        if self.heldout_teacher is None:
            return {}
        found = heldout_distillation(
            [unwrap(chunk) for chunk in self.model],
            self.groups,
            self.heldout_teacher,
            build_objective(self.config.distillation),
            self.heldout,
            device=self.runtime.device,
            micro_batch_size=self.config.training.micro_batch_size,
            execution=self.config.distillation.loss,
        )
        return {
            "eval_kd_loss": found.kd_loss,
            "eval_teacher_entropy": found.teacher_entropy,
            "eval_tail_mass": found.tail_mass,
        }

    def _flops(self, progress: Progress) -> int:
        return self.cost.total(progress.step, self.source.counts.student, self.source.counts.teacher)

    def _evaluate_before_the_first_step(self, progress: Progress) -> None:
        if self.source.needs_heldout_loss and progress.step == 0:
            self.source.after_evaluation(self._heldout_totals().loss)

    def _heldout_totals(self) -> HeldoutLoss:
        gather_parameters(self.model)
        return heldout_loss(
            [unwrap(chunk) for chunk in self.model],
            self.groups,
            self.heldout,
            device=self.runtime.device,
            micro_batch_size=self.config.training.micro_batch_size,
            tile_bytes=self.config.distillation.loss.tile_bytes,
        )

    def _gather_parameters_for_text(self) -> None:
        """Text is written by the model itself, outside DDP's forward pass."""
        if self.config.distillation.method in METHODS_WITH_TEXT:
            gather_parameters(self.model)

    def _save(self, progress: Progress, in_background: bool) -> None:
        """Begin a checkpoint; without a background, finish it too."""
        self.watchdog.beat(f"checkpoint of step {progress.step}")
        self._tell(Action.SAVE, progress)
        self._saved_step = progress.step
        self.tracker.flush()
        gather_parameters(self.model)
        in_background &= self.config.training.async_save
        state = training_state(self.model, self.optimizer, self.groups, is_loading=False)
        about = description(progress, self.architecture, self._about(progress), source_files(self.source))
        self.writer.begin(progress.step, state, about, in_background=in_background)
        if not in_background:
            self.writer.finish()

    def _about(self, progress: Progress) -> dict[str, Any]:
        """What a checkpoint's manifest says beside its progress."""
        return {
            "tokenizer_hash": self.data.tokenizer_hash,
            "tokenizer_path": str(self.data.tokenizer_path.absolute()),
            "eos_id": self.data.eos_id,
            "dataset_fingerprint": self.data.fingerprint,
            "dataset_path": str(self.data.path),
            "seq_length": self._seq_length,
            "precision": self.config.training.precision,
            "layout": as_mapping(self.layout),
            "config": dataclasses.asdict(self.config),
            "dataset_parents": self.data.manifest.get("parents", []),
            "train_flops": self._flops(progress),
            "evaluation": self._evaluated,
        }

    def _batches(self, first_position: int) -> Iterator[list[Batch]]:
        """Every global batch from a position on, without end: skipped ones make the run read more than its steps."""
        settings = self.config.training
        for position in itertools.count(first_position):
            rows = self.schedule.micro_batches(
                position, self.groups.dp.rank(), self.groups.dp.size(), settings.micro_batch_size
            )
            yield [make_batch(self.data, indices, self._seq_length, self.config.data.mask_prompt) for indices in rows]

    @property
    def _seq_length(self) -> int:
        return self.config.data.seq_length or self.data.seq_length


def _is_due(step: int, interval: int | None, last: int) -> bool:
    return step == last or _is_due_now(step, interval)


def _is_due_now(step: int, interval: int | None) -> bool:
    return bool(interval and step % interval == 0)
