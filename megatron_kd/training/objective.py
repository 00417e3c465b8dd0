"""What is minimised: the ``distillation.*`` keys, and the loss of one micro-batch as Megatron-Core's schedules want it.

Losses are sums with their counts; the one division happens in ``finalize_model_grads`` for the gradients and in
``train_step`` for the log, by the same number: the unmasked tokens (``loss_reduction`` token) or the sequences
(``sequence``: the paper's mean of per-sequence means) of the global batch.
"""

from dataclasses import dataclass
from typing import Any, Callable, Iterator, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.losses import DistillationObjective, Workspace, divergence_from_config, linear_distillation_loss
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.teachers.interface import Teacher

LossReduction = Literal["token", "sequence"]
REPORTED_SUMS = ("loss", "lm", "kd", "teacher_entropy", "tokens", "sequences")


@dataclass(frozen=True)
class DistillationConfig:
    """The ``distillation.*`` keys."""

    method: Literal["none", "vanilla_kd"] = "none"
    kd_ratio: float = 0.5
    """loss = (1 - kd_ratio) · LM + kd_ratio · divergence."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"] = "forward_kl"
    beta: float = 0.5
    """Weight of the teacher in JSD's mixture."""
    skew_alpha: float = 0.1
    """Weight of the other distribution in the skewed divergences' mixture."""
    temperature: float = 1.0
    sparse_target: Literal["auto", "ghost", "renormalised", "sampled", "weighted"] = "auto"
    """The loss against knowledge of a few ids a token; auto is ghost for the largest, sampled or weighted for draws."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if not 0 <= self.kd_ratio <= 1:
            yield f"'distillation.kd_ratio' must be between 0 and 1, not {self.kd_ratio}"
        if self.temperature <= 0:
            yield f"'distillation.temperature' must be above 0, not {self.temperature}"
        if not 0 < self.beta < 1:
            yield f"'distillation.beta' must be between 0 and 1 (both excluded), not {self.beta}"
        if not 0 <= self.skew_alpha < 1:
            yield f"'distillation.skew_alpha' must be in [0, 1), not {self.skew_alpha}"


def build_objective(config: DistillationConfig) -> DistillationObjective:
    """The weights and the divergence of a configuration."""
    if config.method == "none":
        return DistillationObjective(lm_weight=1.0, kd_weight=0.0)
    return DistillationObjective(
        lm_weight=1.0 - config.kd_ratio,
        kd_weight=config.kd_ratio,
        temperature=config.temperature,
        divergence=divergence_from_config(config.divergence, beta=config.beta, skew_alpha=config.skew_alpha),
    )


class MicroBatchLoss:
    """Megatron-Core's ``forward_step_func``: a micro-batch through the student, its loss with a teacher's knowledge."""

    def __init__(
        self,
        objective: DistillationObjective,
        teacher: Teacher | None,
        groups: ProcessGroupCollection,
        reduction: LossReduction,
        unwrap: Callable[[torch.nn.Module], HiddenStateGPTModel],
    ):
        self._objective = objective
        self._teacher = teacher
        self._groups = groups
        self._reduction = reduction
        self._unwrap = unwrap
        self._workspace = Workspace()

    def __call__(self, batches: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Forward one micro-batch through ``chunk``; the second value computes the loss on the last stage."""
        batch = next(batches)
        model = self._unwrap(chunk)
        knowledge = self._teacher.knowledge(batch) if self._teacher is not None and model.post_process else None
        hidden = chunk(batch.tokens, batch.position_ids, None)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            weights, count = token_weights(batch, self._reduction)
            result = linear_distillation_loss(
                output,
                model.output_head(),
                sequence_major(batch.labels),
                weights,
                self._objective,
                knowledge,
                tp_group=self._groups.tp,
                sequence_parallel=model.config.sequence_parallel,
                workspace=self._workspace,
            )
            sums = torch.stack(
                [
                    result.loss_sum.detach(),
                    result.lm_sum,
                    _or_zero(result.kd_sum, result.lm_sum),
                    _or_zero(result.teacher_entropy_sum, result.lm_sum),
                    result.token_count.float(),
                    _sequences(batch).float(),
                ]
            )
            return result.loss_sum, count.int(), {"sums": sums}

        return hidden, loss


def sequence_major(values: Tensor) -> Tensor:
    """[b, s] -> [s · b], the order of Megatron-Core's hidden states."""
    return values.transpose(0, 1).reshape(-1)


def token_weights(batch: Batch, reduction: LossReduction) -> tuple[Tensor, Tensor]:
    """Weight of every token [s · b] and the count by which their weighted losses are divided (0-d)."""
    if reduction == "token":
        return sequence_major(batch.loss_mask), (batch.loss_mask > 0).sum()
    lengths = batch.loss_mask.sum(dim=1, keepdim=True)
    return sequence_major(batch.loss_mask / lengths.clamp(min=1.0)), _sequences(batch)


def _sequences(batch: Batch) -> Tensor:
    return (batch.loss_mask.sum(dim=1) > 0).sum()


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value
