"""Where the micro-batches of a step come from: the dataset, or text that is generated for the step.

The loop reads the dataset's micro-batches in order and hands each step's to the source, which returns those to train
on. What a source decides is a pure function of (seed, position) and of a small state that it puts into the checkpoint,
one file beside the weights, so a resumed run decides as if it had never stopped.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_kd.checkpoints.weights import CheckpointInfo
from megatron_kd.data.batch import Batch

STATE_NAME = "batch_source.npz"


@dataclass(frozen=True)
class Place:
    """The place of a step in the run.

    Attributes:
        step: its number, from 0.
        steps: how many there are.
        position: the number of its global batch, skipped ones counted.
    """

    step: int
    steps: int
    position: int


@dataclass(frozen=True)
class StepBatches:
    """What a step trains on.

    Attributes:
        batches: this rank's micro-batches.
        facts: values for the log.
        scheduled: they are the dataset's next ones, in every step of the run, so that a teacher may read ahead.
    """

    batches: list[Batch]
    facts: dict[str, Any] = field(default_factory=dict)
    scheduled: bool = False


@dataclass
class TextCounts:
    """Sequences that a run has generated so far, over all ranks: they cost forward passes."""

    student: int = 0
    teacher: int = 0

    @classmethod
    def from_array(cls, values: np.ndarray) -> "TextCounts":
        """Read :meth:`to_array`."""
        return cls(*map(int, values))

    def to_array(self) -> np.ndarray:
        """Return both counts as a checkpoint keeps them."""
        return np.array([self.student, self.teacher])


class BatchSource(Protocol):
    """The source of the micro-batches of one method."""

    @property
    def counts(self) -> TextCounts:
        """Sequences that it has generated."""

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """Return the micro-batches of a step, given the dataset's. Collective over the student's ranks."""

    def after_evaluation(self, loss: float) -> None:
        """Learn a held-out loss: after every evaluation, and before the first step where the method needs it."""

    def state(self) -> Mapping[str, np.ndarray]:
        """Return what a checkpoint has to keep, the same on every rank."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a checkpoint's state."""


class DatasetSource:
    """The dataset's micro-batches as they are: pre-training, Vanilla KD, and a base class for other methods."""

    def __init__(self) -> None:
        self.counts = TextCounts()

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """See :class:`BatchSource`."""
        return StepBatches(list(dataset), scheduled=True)

    def after_evaluation(self, loss: float) -> None:
        """Do nothing: no decision depends on the held-out loss."""

    def state(self) -> Mapping[str, np.ndarray]:
        """Return nothing: everything follows from the position."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Do nothing: there is no state."""


def source_files(source: BatchSource) -> dict[str, bytes]:
    """Return the state as file name -> contents; nothing for a source without state."""
    state = source.state()
    if not state:
        return {}
    buffer = io.BytesIO()
    np.savez(buffer, **state)  # type: ignore[arg-type]  # NumPy types its one keyword option for all of them
    return {STATE_NAME: buffer.getvalue()}


def restore_source(source: BatchSource, info: CheckpointInfo) -> None:
    """Restore the state from a checkpoint; one of a run without generated text leaves the source as new."""
    path = info.path / STATE_NAME
    if path.is_file():
        with np.load(path) as state:
            source.restore(dict(state))
