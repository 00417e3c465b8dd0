"""The pre-training loss of the dataset's micro-batches, beside a method's own micro-batches of generated text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.losses.types import DistillationObjective
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import sum_over_group
from megatron_kd.training.methods.source import BatchSource, Place, StepBatches, TextCounts
from megatron_kd.training.objective import FusedLoss, Knowledge, LossSums, token_weights
from megatron_kd.training.train_config import LossReduction


@dataclass(frozen=True)
class PretrainingShare:
    """Payload of a dataset's micro-batch that is trained on beside generated text.

    Attributes:
        scale: factor of its summed loss, which is not counted in the step's denominator.
    """

    role: ClassVar[str] = "pretraining"
    scale: float

    def to(self, device: torch.device | str) -> "PretrainingShare":
        """Return itself: it holds no tensor."""
        return self


class PretrainingBeside:
    """Adds the dataset's micro-batches to another source's: their mean pre-training loss, times ``weight``.

    Gradients are divided by the other micro-batches' count alone, so these are scaled by the ratio of the counts.

    Args:
        count: what a micro-batch of the source adds to the step's denominator.
        pretraining_count: what one of the dataset would.
    """

    def __init__(
        self,
        source: BatchSource,
        weight: float,
        groups: ProcessGroupCollection,
        count: Callable[[Batch], Tensor],
        pretraining_count: Callable[[Batch], Tensor],
    ) -> None:
        self._source, self._weight, self._groups = source, weight, groups
        self._count, self._pretraining_count = count, pretraining_count

    @property
    def counts(self) -> TextCounts:
        """Sequences that the source has generated."""
        return self._source.counts

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        made = self._source.batches(place, dataset)
        sums = torch.tensor(
            [
                sum(float(self._count(batch)) for batch in made.batches),
                sum(float(self._pretraining_count(batch)) for batch in dataset),
            ],
            dtype=torch.float64,
            device=dataset[0].tokens.device,
        )
        main_count, pretraining_count = sum_over_group(sums, self._groups.dp).tolist()
        share = PretrainingShare(self._weight * max(1.0, main_count) / max(1.0, pretraining_count))
        beside = [replace(batch, payload=share) for batch in dataset]
        return StepBatches([*made.batches, *beside], made.facts)

    def after_evaluation(self, loss: float) -> None:
        """Tell the source."""
        self._source.after_evaluation(loss)

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the source's state."""
        return self._source.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore the source."""
        self._source.restore(state)


class PretrainingLoss:
    """The loss of micro-batches with a :class:`PretrainingShare`: scaled, and not counted in the denominator."""

    extra: tuple[str, ...] = ("pretraining",)

    def __init__(self, objective: DistillationObjective, fused: FusedLoss, reduction: LossReduction) -> None:
        self._objective, self._fused, self._reduction = objective, fused, reduction
        self.uses_teacher = objective.kd_weight > 0

    def count(self, batch: Batch) -> Tensor:
        """Return what the micro-batch would add to the divisor if it were a main one."""
        return token_weights(batch, self._reduction, self._fused.groups.cp)[1]

    def __call__(
        self, batch: Batch, model: HiddenStateGPTModel, hidden: Tensor, knowledge: Knowledge | None
    ) -> LossSums:
        """See :class:`~megatron_kd.training.objective.BatchLoss`."""
        share = cast(PretrainingShare, batch.payload)
        weights, count = token_weights(batch, self._reduction, self._fused.groups.cp)
        result = self._fused(batch, model, hidden, weights * share.scale, self._objective, knowledge)
        value = result.loss_sum.detach()
        return LossSums(result.loss_sum, torch.zeros_like(count), {"loss": value, "pretraining": value})
