"""The training loop: batches in order, steps, metrics, evaluation, checkpoints, and the response to faults."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

from megatron_kd.checkpoints.checkpoint_writer import CheckpointWriter, Retention
from megatron_kd.config import to_mapping
from megatron_kd.costs.flops import PRETRAINING, RunCost
from megatron_kd.data.batch import Batch
from megatron_kd.data.workers import prefetch
from megatron_kd.errors import NonFiniteLossError, Preempted
from megatron_kd.metrics.device import MemoryMeter, peak_flops
from megatron_kd.metrics.tracker import RunTracker
from megatron_kd.parallel.layout import as_mapping
from megatron_kd.scoring.chunk_losses import HeldoutLoss
from megatron_kd.teachers.interface import Action, Decision
from megatron_kd.training.checkpoint import (
    Progress,
    description,
    load_checkpoint,
    newest_whole_checkpoint,
    training_state,
)
from megatron_kd.training.fault_tolerance import FaultPolicy
from megatron_kd.training.heldout import HeldoutEvaluation
from megatron_kd.training.methods.method_table import METHODS
from megatron_kd.training.methods.source import BatchSource, Place, restore_source, source_files
from megatron_kd.training.optimizer import learning_rate
from megatron_kd.training.train_step import StepResult, TrainStep
from megatron_kd.training.training_run import ScheduledData, TrainingRun
from megatron_kd.training.watchdogs import HangWatchdog, StopSignals


class Trainer:
    """The loop of one run.

    Args:
        run: configuration, data, layout and sizes.
        step: one optimizer step, with the student and its teacher.
        source: the micro-batches that a step trains on, given the dataset's.
        progress: where the loop starts.
    """

    def __init__(self, run: TrainingRun, step: TrainStep, source: BatchSource, progress: Progress):
        self._run, self._config = run, run.config
        self._step, self._source, self._start = step, source, progress
        self._method = METHODS[run.config.distillation.method]
        self._schedule = ScheduledData(run)
        self._heldout = (
            None if run.heldout is None else HeldoutEvaluation(run, run.heldout, step.model, step.groups, step.teacher)
        )
        self._cost = run_cost(run)
        self._memory = MemoryMeter(run.device)
        self._peak_flops = peak_flops(run.device, run.config.metrics.peak_tflops)
        faults, training = run.config.fault_tolerance, run.config.training
        self._fault_policy = FaultPolicy(faults, run.folder, run.runtime.is_main)
        self._signals = StopSignals(faults.exit_within_seconds)
        self._watchdog = HangWatchdog(60.0 * faults.hang_minutes)
        self._checkpoints = CheckpointWriter(
            run.folder / "checkpoints", Retention(training.keep_checkpoints, training.keep_every)
        )
        self._tracker = self._open_tracker(progress)
        self._saved_step = progress.step or None
        self._evaluated: dict[str, float] | None = None

    def train(self) -> None:
        """Train to the end.

        Raises:
            Preempted: a signal asked the run to stop; a checkpoint was written.
            NonFiniteLossError: a batch that the policy does not skip.
        """
        progress, last = self._start, self._config.training.train_iters
        with ExitStack() as stack:
            stack.enter_context(self._signals)
            stack.enter_context(self._watchdog)
            stack.callback(self._checkpoints.abandon)
            stack.callback(lambda: self._tracker.close())
            batches = stack.enter_context(closing(prefetch(lambda: self._batches(self._start.position), depth=2)))
            self._tell(Action.CONTINUE if progress.step < last else Action.STOP, progress)
            if self._method.needs_heldout_loss and progress.step == 0:
                self._source.after_evaluation(self._heldout_loss().loss)
            while progress.step < last:
                progress = self._advance(next(batches), progress)

    def _advance(self, batches: Sequence[Batch], progress: Progress) -> Progress:
        """Train on one global batch, and do whatever is due after it."""
        training, before = self._config.training, progress
        self._watchdog.beat(f"step {progress.step + 1}")
        progress, rolls_back = self._train_one(batches, progress)
        if rolls_back:
            return self._rewind(progress)
        has_stepped = progress.step > before.step
        if has_stepped and _is_due(progress.step, training.eval_interval, training.train_iters):
            self._watchdog.beat(f"evaluation after step {progress.step}")
            self._evaluate(progress)
        group = self._step.groups.intra_dist_opt
        stops, writing = self._signals.agree(group, self._run.device, self._checkpoints.is_writing)
        ended = progress.step == training.train_iters
        is_due = has_stepped and _is_due(progress.step, training.save_interval, training.train_iters)
        if is_due or (stops and self._saved_step != progress.step):
            self._save(progress, in_background=not (stops or ended))
        elif stops or not writing:
            self._checkpoints.finish()
        self._tell(Action.STOP if stops or ended else Action.CONTINUE, progress)
        if stops and not ended:
            raise Preempted(
                f"told to stop: step {progress.step} of {training.train_iters} is saved in {self._run.folder}; start "
                "the same command again to resume"
            )
        return progress

    def _train_one(self, batches: Sequence[Batch], progress: Progress) -> tuple[Progress, bool]:
        """Return the progress after a step or a skipped batch, and whether its loss asks for a rollback."""
        started = time.perf_counter()
        rate = learning_rate(progress.step, self._config.optimizer, self._config.training.train_iters)
        chunks = self._schedule.chunks(progress.position)
        place = Place(progress.step, self._config.training.train_iters, progress.position)
        if self._method.generates_text:  # by the model itself, outside DDP's forward pass
            self._step.gather_parameters()
        try:
            made = self._source.batches(place, [batch.to(self._run.device) for batch in batches])
            measures = _is_multiple(progress.step + 1, self._config.metrics.kd_lm_gradient_ratio_interval)
            result = self._step(made.batches, rate, scheduled=made.scheduled, with_gradient_ratio=measures)
        except NonFiniteLossError as error:
            reason = f"{error}; chunks of the batch: {chunks}"
            skipped = self._fault_policy.skip(progress.faults, progress.step + 1, reason)
            if skipped is None:
                self._checkpoints.finish()  # every rank sees the same loss, so all are here
                raise NonFiniteLossError(f"step {progress.step + 1}: {reason}") from None
            return dataclasses.replace(progress, faults=skipped), False
        seconds = time.perf_counter() - started
        faults, rolls_back = self._fault_policy.after_loss(
            progress.faults, progress.step + 1, result.loss, chunks, has_checkpoint=self._saved_step is not None
        )
        progress = Progress(progress.step + 1, progress.tokens + result.tokens, progress.seconds + seconds, faults)
        self._tracker.step(self._row(progress, result, rate, seconds) | made.facts)
        return progress, rolls_back

    def _rewind(self, progress: Progress) -> Progress:
        """Return to the newest checkpoint; the batches since then are skipped."""
        self._tell(Action.REWIND, progress)
        self._watchdog.beat(f"rollback after step {progress.step}")
        self._checkpoints.finish()
        info = newest_whole_checkpoint(self._run.folder / "checkpoints")
        assert info is not None  # without a saved step the policy does not roll back
        restored = load_checkpoint(info, self._step.model, self._step.optimizer, self._step.groups)
        restore_source(self._source, info)
        self._saved_step = restored.step
        faults = dataclasses.replace(
            progress.faults, skipped_batches=progress.position - restored.step, losses=restored.faults.losses
        )
        text = f"resuming from step {restored.step} with global batch {progress.position}"
        self._fault_policy.record("rollback", progress.step, text)
        restored = dataclasses.replace(restored, faults=faults)
        self._tracker.close()
        self._tracker = self._open_tracker(restored)
        return restored

    def _tell(self, action: Action, progress: Progress) -> None:
        if self._step.teacher is not None:
            self._step.teacher.follow(Decision(action, progress.position, progress.step))

    def _open_tracker(self, progress: Progress) -> RunTracker:
        return RunTracker(
            self._run.folder,
            self._config.training.train_iters,
            progress.step,
            self._run.runtime.is_main,
            self._config.model.name,
            self._config.metrics,
            to_mapping(self._config),
        )

    def _row(self, progress: Progress, result: StepResult, rate: float, seconds: float) -> dict[str, Any]:
        positions = self._run.positions_per_step
        flops_per_second = self._cost.flops_per_token * positions / seconds
        devices = self._run.layout.world_size + self._config.teacher.own_ranks
        mfu = {"mfu": flops_per_second / (devices * self._peak_flops)} if self._peak_flops else {}
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
            "memory_bytes": self._memory.read(),
            "train_flops": self._flops(progress),
            "seconds": progress.seconds,
            **result.extra,
        }

    def _evaluate(self, progress: Progress) -> None:
        if self._heldout is None:
            return
        totals = self._heldout_loss()
        self._source.after_evaluation(totals.loss)
        self._evaluated = {"eval_loss": totals.loss, "bits_per_byte": totals.bits_per_byte, "tokens": totals.tokens}
        self._tracker.evaluation(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "eval_loss": totals.loss,
                "bits_per_byte": totals.bits_per_byte,
                "eval_tokens": totals.tokens,
                **self._heldout.distillation(),
                "train_flops": self._flops(progress),
            }
        )

    def _heldout_loss(self) -> HeldoutLoss:
        assert self._heldout is not None  # a method that needs the loss is refused without data.eval_path
        self._step.gather_parameters()
        return self._heldout.loss()

    def _flops(self, progress: Progress) -> int:
        return self._cost.total(progress.step, self._source.counts.student, self._source.counts.teacher)

    def _save(self, progress: Progress, in_background: bool) -> None:
        """Begin a checkpoint, and finish it unless it is written in the background."""
        self._watchdog.beat(f"checkpoint of step {progress.step}")
        self._tell(Action.SAVE, progress)
        self._saved_step = progress.step
        self._tracker.flush()
        self._step.gather_parameters()
        in_background &= self._config.training.async_save
        state = training_state(self._step.model, self._step.optimizer, self._step.groups, is_loading=False)
        about = description(progress, self._run.architecture, self._about(progress), source_files(self._source))
        self._checkpoints.begin(progress.step, state, about, in_background=in_background)
        if not in_background:
            self._checkpoints.finish()

    def _about(self, progress: Progress) -> dict[str, Any]:
        """Return what a checkpoint's manifest says beside its progress."""
        data = self._run.data
        return {
            "tokenizer_hash": data.tokenizer_hash,
            "tokenizer_path": str(data.tokenizer_path.absolute()),
            "eos_id": data.eos_id,
            "dataset_fingerprint": data.fingerprint,
            "dataset_path": str(data.path),
            "seq_length": self._run.seq_length,
            "precision": self._config.training.precision,
            "layout": as_mapping(self._run.layout),
            "config": dataclasses.asdict(self._config),
            "dataset_parents": data.manifest.get("parents", []),
            "train_flops": self._flops(progress),
            "evaluation": self._evaluated,
        }

    def _batches(self, first_position: int) -> Iterator[list[Batch]]:
        """Read every global batch from a position on, without end: a run that skips some reads more than its steps."""
        rank = self._step.groups.dp.rank()
        for position in itertools.count(first_position):
            yield self._schedule.read_all(position, rank)


def run_cost(run: TrainingRun) -> RunCost:
    """Return how the run's FLOPs are counted; a cached teacher's were counted where the cache was made."""
    settings, teacher = run.config.distillation, run.teacher_architecture
    return RunCost(
        method=METHODS[settings.method].cost if teacher is not None else PRETRAINING,
        student_parameters=run.architecture.parameters,
        teacher_parameters=teacher.parameters if teacher is not None else 0,
        positions=run.positions_per_step,
        seq_length=run.seq_length,
        has_pretraining=settings.pretraining_weight > 0,
        pretraining_has_teacher=settings.pretraining_uses_teacher,
    )


def _is_due(step: int, interval: int | None, last: int) -> bool:
    return step == last or _is_multiple(step, interval)


def _is_multiple(step: int, interval: int | None) -> bool:
    return bool(interval and step % interval == 0)
