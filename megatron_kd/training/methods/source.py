"""Where the batches of a step come from: the dataset, or text that is generated for the step.

The loop reads the dataset's batches in order and hands each to the source, which gives the batches to train on. What a
source decides is a pure function of (seed, position) and of the little state that it puts into the checkpoint, so a
resumed run goes on as if it had never stopped.

A batch source's state in a checkpoint: one small file beside the weights.
"""

import io
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Protocol, Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.checkpoints.weights import CheckpointInfo
from megatron_kd.data.batch import Batch
from megatron_kd.parallel.groups import sum_over_group
from megatron_kd.training.methods.batches import auxiliary_batch


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


class PretrainingBeside:
    """Another source's batches and, beside them, the mean pre-training loss of the dataset's, times ``weight``.

    Gradients are divided by the other batches' count alone, so these are scaled by the ratio of the counts.

    Args:
        count: what a micro-batch of the source adds to the step's denominator.
        auxiliary_count: what one of the dataset would.
    """

    def __init__(
        self,
        source: BatchSource,
        weight: float,
        groups: ProcessGroupCollection,
        count: Callable[[Batch], Tensor],
        auxiliary_count: Callable[[Batch], Tensor],
    ) -> None:
        self._source, self._weight, self._groups = source, weight, groups
        self._count, self._auxiliary_count = count, auxiliary_count
        self.needs_heldout_loss = source.needs_heldout_loss
        self.after_evaluation = source.after_evaluation
        self.state, self.restore = source.state, source.restore

    @property
    def counts(self) -> TextCounts:
        """Of the source."""
        return self._source.counts

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """See :class:`BatchSource`."""
        made = self._source.batches(place, dataset)
        sums = torch.tensor(
            [
                sum(float(self._count(batch)) for batch in made.batches),
                sum(float(self._auxiliary_count(batch)) for batch in dataset),
            ],
            dtype=torch.float64,
            device=dataset[0].tokens.device,
        )
        main_count, auxiliary_count = sum_over_group(sums, self._groups.dp).tolist()
        scale = self._weight * max(1.0, main_count) / max(1.0, auxiliary_count)
        return StepBatches([*made.batches, *(auxiliary_batch(batch, scale) for batch in dataset)], made.facts)


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
