"""What is minimized: the objective of a configuration, and the loss of one micro-batch as Megatron-Core's schedules
want it.

Losses are sums with their counts. The one division happens in ``finalize_model_grads`` for the gradients and in
``train_step`` for the log, by the same number: the unmasked tokens (``loss_reduction`` token) or the sequences
(``sequence``: the mean over sequences of each one's mean, as in the MiniPLM paper) of the global batch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.losses.divergences import divergence_from_config
from megatron_kd.losses.fused_linear import linear_distillation_loss
from megatron_kd.losses.tile_buffers import Workspace
from megatron_kd.losses.types import DenseKnowledge, DistillationObjective, LossOutput, SparseKnowledge
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import own_positions
from megatron_kd.teachers.interface import Teacher
from megatron_kd.training.distillation_config import DistillationConfig, LossConfig
from megatron_kd.training.methods.method_table import METHODS
from megatron_kd.training.train_config import LossReduction

Knowledge = DenseKnowledge | SparseKnowledge
REPORTED_SUMS = ("loss", "lm", "kd", "teacher_entropy", "tokens", "count")


def build_objective(config: DistillationConfig) -> DistillationObjective:
    """Build the weights and the divergence of a configuration; in MiniLLM those of its pre-training loss."""
    if not METHODS[config.method].needs_teacher:
        return DistillationObjective(lm_weight=1.0, kd_weight=0.0)
    ratio, name = config.resolved_kd_ratio, config.resolved_divergence
    if name == "jsd" and config.beta in (0.0, 1.0):
        name = "forward_kl" if config.beta == 0 else "reverse_kl"
    return DistillationObjective(
        lm_weight=1.0 - ratio,
        kd_weight=ratio,
        temperature=config.temperature,
        temperature_squared=config.temperature_squared,
        divergence=divergence_from_config(name, beta=config.beta, skew_alpha=config.skew_alpha),
    )


class FusedLoss:
    """Calls the fused loss the same way for every objective of a run.

    Args:
        groups: the student's.
        config: backend and memory budget.
    """

    def __init__(self, groups: ProcessGroupCollection, config: LossConfig | None = None) -> None:
        self.groups = groups
        self._config = config or LossConfig()
        self._workspace = Workspace()

    def __call__(
        self,
        batch: Batch,
        model: HiddenStateGPTModel,
        hidden: Tensor,
        weights: Tensor,
        objective: DistillationObjective,
        knowledge: Knowledge | None = None,
    ) -> LossOutput:
        """Return the weighted loss sums of a micro-batch.

        Args:
            hidden: the student's final hidden states, [s, b, h].
            weights: [s · b], of this rank's positions, see :func:`sequence_major`.
        """
        return linear_distillation_loss(
            hidden,
            model.output_head(),
            sequence_major(batch.labels, self.groups.cp),
            weights,
            objective,
            knowledge,
            tp_group=self.groups.tp,
            sequence_parallel=model.config.sequence_parallel,
            tile_bytes=self._config.tile_bytes,
            backend=self._config.backend,
            workspace=self._workspace,
        )


@dataclass(frozen=True)
class LossSums:
    """What one micro-batch adds to a step.

    Attributes:
        loss: differentiable sum over the micro-batch, 0-d, nats.
        count: what it adds to the number by which the step's loss is divided, 0-d.
        reported: detached sums for the log, by name, 0-d.
    """

    loss: Tensor
    count: Tensor
    reported: dict[str, Tensor]


class BatchLoss(Protocol):
    """The loss of the micro-batches of one role (:attr:`Batch.role`)."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher is asked about them."""

    @property
    def extra(self) -> tuple[str, ...]:
        """Names of sums that are reported beside :data:`REPORTED_SUMS`."""

    def count(self, batch: Batch) -> Tensor:
        """Return what a micro-batch adds to the number by which the step's loss is divided, 0-d."""

    def __call__(
        self, batch: Batch, model: HiddenStateGPTModel, hidden: Tensor, knowledge: Knowledge | None
    ) -> LossSums:
        """Compute a micro-batch's loss on the last pipeline stage."""


class DistillationLoss:
    """(1 - kd_ratio) · LM + kd_ratio · divergence: the loss of pre-training and of all methods but MiniLLM."""

    uses_teacher = True

    def __init__(
        self,
        objective: DistillationObjective,
        fused: FusedLoss,
        reduction: LossReduction,
        *,
        reports_tail_mass: bool = False,
    ) -> None:
        self.objective, self._fused, self._reduction = objective, fused, reduction
        self.extra: tuple[str, ...] = ("tail_mass",) if reports_tail_mass else ()

    def objective_of(self, batch: Batch) -> DistillationObjective:
        """Return the objective of a micro-batch, here the same for all; a method may derive it from the payload."""
        return self.objective

    def count(self, batch: Batch) -> Tensor:
        """See :class:`BatchLoss`."""
        return token_weights(batch, self._reduction, self._fused.groups.cp)[1]

    def __call__(
        self, batch: Batch, model: HiddenStateGPTModel, hidden: Tensor, knowledge: Knowledge | None
    ) -> LossSums:
        """See :class:`BatchLoss`."""
        weights, count = token_weights(batch, self._reduction, self._fused.groups.cp)
        result = self._fused(batch, model, hidden, weights, self.objective_of(batch), knowledge)
        reported = {
            "loss": result.loss_sum.detach(),
            "lm": result.lm_sum,
            "kd": result.kd_sum,
            "teacher_entropy": result.teacher_entropy_sum,
            "tail_mass": result.tail_mass_sum,
            "tokens": result.token_count,
        }
        known = {name: value for name, value in reported.items() if value is not None}
        return LossSums(result.loss_sum, count, known)


class MicroBatchLoss:
    """Megatron-Core's ``forward_step_func``: a micro-batch through the student, then the loss of its role.

    Args:
        losses: role of a micro-batch -> its loss; ``main`` is that of batches without a payload.
    """

    def __init__(self, losses: Mapping[str, BatchLoss], teacher: Teacher | None):
        self._losses, self._teacher = losses, teacher
        self.extra = tuple(name for loss in losses.values() for name in loss.extra)
        """Names of sums that are reported beside the usual ones."""
        self.reported = (*REPORTED_SUMS, *self.extra)
        """Names of all reported sums, in order."""

    def __call__(
        self, batches: Iterator[Batch], model_chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Forward one micro-batch through ``model_chunk``; the second value computes the loss on the last stage."""
        batch = next(batches)
        model = unwrap(model_chunk)
        knowledge = None
        if self._teacher is not None and model.post_process and self.needs_knowledge(batch):
            knowledge = self._teacher.knowledge(batch)
        hidden = model_chunk(batch.tokens, batch.position_ids, None)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            sums = self._losses[batch.role](batch, model, output, knowledge)
            zero = sums.loss.detach().new_zeros(())
            known = {**sums.reported, "count": sums.count}
            row = torch.stack([known[name].detach().to(zero) if name in known else zero for name in self.reported])
            return sums.loss, sums.count.int(), {"sums": row}

        return hidden, loss

    def needs_knowledge(self, batch: Batch) -> bool:
        """Whether the teacher is asked about a micro-batch."""
        return self._losses[batch.role].uses_teacher


def unwrap(model_chunk: torch.nn.Module) -> HiddenStateGPTModel:
    """Return the model inside DDP."""
    inner = model_chunk.module if isinstance(model_chunk, DistributedDataParallel) else model_chunk
    return cast(HiddenStateGPTModel, inner)


def sequence_major(values: Tensor, context_group: dist.ProcessGroup | None = None) -> Tensor:
    """[b, s] -> [s · b], the order of Megatron-Core's hidden states; on a context-parallel rank its own positions."""
    return own_positions(values, context_group, 1).transpose(0, 1).reshape(-1)


def token_weights(
    batch: Batch, reduction: LossReduction, context_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weight of every token [s · b] of this rank, and its part of the divisor (0-d).

    The weighted losses of all ranks are divided by the sum of those parts.
    """
    if reduction == "token":
        weights = sequence_major(batch.loss_mask, context_group)
        return weights, (weights > 0).sum()
    lengths = batch.loss_mask.sum(dim=1, keepdim=True)
    weights = sequence_major(batch.loss_mask / lengths.clamp(min=1.0), context_group)
    is_first = context_group is None or context_group.rank() == 0  # the ranks of a group have the same sequences
    return weights, (lengths > 0).sum() * is_first
