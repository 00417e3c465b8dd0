"""What a run does when it is preempted, meets a batch that it cannot learn from, or its loss jumps.

    signals, losses  →  Survival (the same answer on every rank of the student)  →  the trainer acts
                                                                                  →  Decision to the teacher

Nothing here touches weights or checkpoints; what the trainer does about an answer is in ``trainer.py``, what it tells a
teacher on other ranks in ``teachers/control.py``.
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Literal

import torch
import torch.distributed as dist

from megatron_kd.training.watches import SignalWatch

logger = logging.getLogger(__name__)

EVENTS_NAME = "events.jsonl"


@dataclass(frozen=True)
class FaultToleranceConfig:
    """The ``fault_tolerance.*`` keys."""

    exit_within_seconds: float = 25.0
    """From SIGTERM or SIGUSR1 to the process's end; a save that takes longer is given up. torchrun grants 30."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient norm that is not finite does: the batch is never applied."""
    max_skipped_batches: int = 10
    """The run stops at one more than this."""
    spike_deviations: float = 10.0
    """A loss this many standard deviations above the running mean is a spike; 0 turns detection off."""
    spike_warmup_steps: int = 100
    """Losses to see before any counts as a spike."""
    spike_action: Literal["log", "rollback"] = "log"
    """``rollback`` goes back to the newest checkpoint and on with the batches after the spike."""
    max_rollbacks: int = 3
    hang_minutes: float = 20.0
    """A step that takes longer ends the run with an error that names the ranks which hold it up; 0 turns it off."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.exit_within_seconds <= 0:
            yield f"'fault_tolerance.exit_within_seconds' must be above 0, not {self.exit_within_seconds}"
        if self.spike_warmup_steps < 2:
            yield f"'fault_tolerance.spike_warmup_steps' must be at least 2, not {self.spike_warmup_steps}"
        for name in ("max_skipped_batches", "spike_deviations", "max_rollbacks", "hang_minutes"):
            if getattr(self, name) < 0:
                yield f"'fault_tolerance.{name}' must not be negative, it is {getattr(self, name)}"


@dataclass(frozen=True)
class LossStatistics:
    """Running mean and variance of the loss (exponential, over about 100 steps). Part of a checkpoint."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    DECAY = 0.99

    def deviations(self, loss: float) -> float:
        """How many standard deviations ``loss`` is above the mean; a hundredth of the mean counts as one at least."""
        return (loss - self.mean) / max(math.sqrt(self.variance), 0.01 * abs(self.mean), 1e-12)

    def add(self, loss: float, limit: float = math.inf) -> "LossStatistics":
        """With one more loss, which counts for at most ``limit`` deviations: a lasting new level becomes the mean."""
        if self.count and self.deviations(loss) > limit:
            loss = self.mean + limit * max(math.sqrt(self.variance), 0.01 * abs(self.mean), 1e-12)
        weight = max(1.0 / (self.count + 1), 1.0 - self.DECAY)
        difference = loss - self.mean
        mean = self.mean + weight * difference
        variance = (1.0 - weight) * (self.variance + weight * difference * difference)
        return LossStatistics(self.count + 1, mean, variance)


@dataclass(frozen=True)
class Incidents:
    """What a run has survived so far. Part of a checkpoint, so that a resumed run decides the same."""

    skipped_batches: int = 0
    """Batches read and not learnt from: position of the next batch = steps + this."""
    non_finite: int = 0
    """Those skipped because the loss or the gradient was not finite."""
    rollbacks: int = 0
    losses: LossStatistics = field(default_factory=LossStatistics)

    @classmethod
    def from_mapping(cls, values: dict[str, Any] | None) -> "Incidents":
        """From a checkpoint's manifest; None (an older one) means nothing happened."""
        if not values:
            return cls()
        return cls(**{**values, "losses": LossStatistics(**values["losses"])})


class Survival:
    """Decides after every step; the same values on every rank, so no two ranks part ways.

    Args:
        config: the policy.
        folder: the run folder; events are appended to its ``events.jsonl``.
        signals: what this process was told.
        group: all ranks of the student.
        is_main: whether this rank writes.
    """

    def __init__(
        self, config: FaultToleranceConfig, folder: Path, signals: SignalWatch, group: dist.ProcessGroup, is_main: bool
    ):
        self.config, self._folder, self._signals = config, folder, signals
        self._group, self._is_main = group, is_main

    def agree(self, device: torch.device, is_writing: bool = False) -> tuple[bool, bool]:
        """Whether any rank was signalled to stop, and whether any still writes a checkpoint.

        Collective over the student's ranks.
        """
        told = torch.tensor([bool(self._signals.received), is_writing], dtype=torch.int32, device=device)
        if self._group.size() > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        stops, writing = told.tolist()
        return bool(stops), bool(writing)

    def skip(self, incidents: Incidents, step: int, reason: str) -> Incidents | None:
        """The incidents with one more skipped batch; None where the policy is to stop."""
        if self.config.non_finite == "stop" or incidents.non_finite >= self.config.max_skipped_batches:
            return None
        self.record("skipped batch", step, f"{reason}; the batch is skipped")
        return dataclasses.replace(
            incidents, skipped_batches=incidents.skipped_batches + 1, non_finite=incidents.non_finite + 1
        )

    def after_loss(
        self, incidents: Incidents, step: int, loss: float, chunks: list[int], *, has_checkpoint: bool = True
    ) -> tuple[Incidents, bool]:
        """The incidents with this step's loss, and whether to roll back: not without a checkpoint to go back to."""
        config, before = self.config, incidents.losses
        deviations = before.deviations(loss)
        limit = config.spike_deviations or math.inf
        incidents = dataclasses.replace(incidents, losses=before.add(loss, limit))
        if before.count < config.spike_warmup_steps or deviations <= limit:
            return incidents, False
        text = (
            f"loss {loss:.4f} is {deviations:.1f} standard deviations above the running mean {before.mean:.4f}; "
            f"chunks of the batch: {chunks}"
        )
        self.record("loss spike", step, text)
        if config.spike_action == "log":
            return incidents, False
        if not has_checkpoint:
            self.record("no rollback", step, "nothing saved: going on")
            return incidents, False
        if incidents.rollbacks >= config.max_rollbacks:
            self.record(
                "no rollback", step, f"fault_tolerance.max_rollbacks {config.max_rollbacks} is reached: going on"
            )
            return incidents, False
        return dataclasses.replace(incidents, rollbacks=incidents.rollbacks + 1), True

    def record(self, event: str, step: int, text: str) -> None:
        """Say it on stderr and keep it in ``events.jsonl``; on the main rank only."""
        if not self._is_main:
            return
        logger.info(f"step {step}: {event}: {text}")
        with open(self._folder / EVENTS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "event": event, "text": text}) + "\n")
