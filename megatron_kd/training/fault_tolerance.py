"""Policy for batches that cannot be learned from and for losses that jump: what happens, how often, what is recorded.

Every rank decides from the same values, so no two ranks part ways. Nothing here touches weights or checkpoints:
``trainer.py`` acts on the decisions, and tells a teacher on other ranks (``teachers/interface.py``).
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Literal, Mapping

logger = logging.getLogger(__name__)

EVENTS_NAME = "events.jsonl"


@dataclass(frozen=True)
class FaultToleranceConfig:
    """The ``fault_tolerance.*`` keys."""

    exit_within_seconds: float = 25.0
    """From SIGTERM or SIGUSR1 to the end of the process; a save that takes longer is abandoned. torchrun grants 30."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What happens at a loss or gradient norm that is not finite; the batch is never applied."""
    max_skipped_batches: int = 10
    """The run stops at one more than this."""
    spike_deviations: float = 10.0
    """A loss this many standard deviations above the running mean is a spike; 0 turns detection off."""
    spike_warmup_steps: int = 100
    """Losses to see before any counts as a spike."""
    spike_action: Literal["log", "rollback"] = "log"
    """``rollback`` returns to the newest checkpoint and continues with the batches after the spike."""
    max_rollbacks: int = 3
    hang_minutes: float = 20.0
    """A step that takes longer ends the run with an error that names the ranks which hold it up; 0 turns it off."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
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
        """Return how many standard deviations ``loss`` is above the mean; one is at least 1% of the mean."""
        return (loss - self.mean) / max(math.sqrt(self.variance), 0.01 * abs(self.mean), 1e-12)

    def add(self, loss: float, limit: float = math.inf) -> "LossStatistics":
        """Return the statistics with one more loss.

        The loss counts for at most ``limit`` deviations, so a lasting new level becomes the mean.
        """
        if self.count and self.deviations(loss) > limit:
            loss = self.mean + limit * max(math.sqrt(self.variance), 0.01 * abs(self.mean), 1e-12)
        weight = max(1.0 / (self.count + 1), 1.0 - self.DECAY)
        difference = loss - self.mean
        mean = self.mean + weight * difference
        variance = (1.0 - weight) * (self.variance + weight * difference * difference)
        return LossStatistics(self.count + 1, mean, variance)


@dataclass(frozen=True)
class FaultHistory:
    """Faults that a run has met so far. Part of a checkpoint, so that a resumed run decides the same."""

    skipped_batches: int = 0
    """Batches read and not learned from: position of the next batch = steps + this."""
    non_finite: int = 0
    """Those skipped because the loss or the gradient was not finite."""
    rollbacks: int = 0
    losses: LossStatistics = field(default_factory=LossStatistics)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> "FaultHistory":
        """Read a checkpoint's manifest; None (an older checkpoint) is a run without faults."""
        if not values:
            return cls()
        return cls(**{**values, "losses": LossStatistics(**values["losses"])})


class FaultPolicy:
    """Decides after every step: skip, roll back, or neither.

    Args:
        config: the limits.
        folder: the run folder; events are appended to its ``events.jsonl``.
        is_main: whether this rank writes.
    """

    def __init__(self, config: FaultToleranceConfig, folder: Path, is_main: bool):
        self._config, self._folder, self._is_main = config, folder, is_main

    def skip(self, history: FaultHistory, step: int, reason: str) -> FaultHistory | None:
        """Return the history with one more skipped batch; None where the policy is to stop."""
        if self._config.non_finite == "stop" or history.non_finite >= self._config.max_skipped_batches:
            return None
        self.record("skipped batch", step, f"{reason}; the batch is skipped")
        return dataclasses.replace(
            history, skipped_batches=history.skipped_batches + 1, non_finite=history.non_finite + 1
        )

    def after_loss(
        self, history: FaultHistory, step: int, loss: float, chunks: list[int], *, has_checkpoint: bool = True
    ) -> tuple[FaultHistory, bool]:
        """Return the history with this step's loss, and whether to roll back, which needs a checkpoint."""
        config, before = self._config, history.losses
        deviations = before.deviations(loss)
        limit = config.spike_deviations or math.inf
        history = dataclasses.replace(history, losses=before.add(loss, limit))
        if before.count < config.spike_warmup_steps or deviations <= limit:
            return history, False
        text = (
            f"loss {loss:.4f} is {deviations:.1f} standard deviations above the running mean {before.mean:.4f}; "
            f"chunks of the batch: {chunks}"
        )
        self.record("loss spike", step, text)
        if config.spike_action == "log":
            return history, False
        if not has_checkpoint:
            self.record("no rollback", step, "nothing saved yet: continuing")
            return history, False
        if history.rollbacks >= config.max_rollbacks:
            self.record(
                "no rollback", step, f"{config.max_rollbacks} were made (fault_tolerance.max_rollbacks): continuing"
            )
            return history, False
        return dataclasses.replace(history, rollbacks=history.rollbacks + 1), True

    def record(self, event: str, step: int, text: str) -> None:
        """Log an event and append it to ``events.jsonl``, on the main rank only."""
        if not self._is_main:
            return
        logger.info(f"step {step}: {event}: {text}")
        with open(self._folder / EVENTS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "event": event, "text": text}) + "\n")
