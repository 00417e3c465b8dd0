"""Where the batches of a step come from: the dataset, or text that is generated for the step.

The loop reads the dataset's batches in order and hands each to the source, which gives the batches to train on. What a
source decides is a pure function of (seed, position) and of the little state that it puts into the checkpoint, so a
resumed run goes on as if it had never stopped.

A batch source's state in a checkpoint: one small file beside the weights.
"""

import io
from dataclasses import dataclass, field
from typing import Any, Mapping, Protocol, Sequence

import numpy as np

from megatron_kd.checkpoints.weights import CheckpointInfo
from megatron_kd.data.batch import Batch


@dataclass(frozen=True)
class Place:
    """Where a step stands: its number, how many there are, and its global batch's (skipped ones counted)."""

    step: int
    steps: int
    position: int


@dataclass(frozen=True)
class StepBatches:
    """What a step trains on.

    Attributes:
        batches: this rank's micro-batches.
        facts: what the log says of them.
        scheduled: they are the dataset's next ones, in every step of the run, so that a teacher may read ahead.
    """

    batches: list[Batch]
    facts: dict[str, Any] = field(default_factory=dict)
    scheduled: bool = False


@dataclass
class TextCounts:
    """How many sequences a run has generated so far, over all ranks: they cost forward passes."""

    student: int = 0
    teacher: int = 0


class BatchSource(Protocol):
    """One interface for every method."""

    counts: TextCounts
    needs_heldout_loss: bool

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """The micro-batches of a step, from the dataset's. Collective over the student's ranks."""

    def after_evaluation(self, loss: float) -> None:
        """Learn a held-out loss: before the first step if ``needs_heldout_loss``, and after every evaluation."""

    def state(self) -> Mapping[str, np.ndarray]:
        """What a checkpoint has to keep; the same on every rank."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a checkpoint's state."""


class DatasetSource:
    """The dataset's batches as they are: pre-training and Vanilla KD."""

    needs_heldout_loss = False

    def __init__(self) -> None:
        self.counts = TextCounts()

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """See :class:`BatchSource`."""
        return StepBatches(list(dataset), scheduled=True)

    def after_evaluation(self, loss: float) -> None:
        """Of no interest."""

    def state(self) -> Mapping[str, np.ndarray]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Nothing."""


STATE_NAME = "batch_source.npz"


def source_files(source: BatchSource) -> dict[str, bytes]:
    """File name -> contents; nothing for a source without state."""
    state = source.state()
    if not state:
        return {}
    buffer = io.BytesIO()
    np.savez(buffer, **state)
    return {STATE_NAME: buffer.getvalue()}


def restore_source(source: BatchSource, info: CheckpointInfo) -> None:
    """Go on from a checkpoint; one of a run without generated text leaves the source as new."""
    path = info.path / STATE_NAME
    if path.is_file():
        with np.load(path) as state:
            source.restore(dict(state))
