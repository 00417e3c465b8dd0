"""MiniLLM (arXiv 2306.08543): rollouts of the student, mixed with the teacher, and their loss.

    source      prompts of the dataset's micro-batches -> responses, with log q, log p and log p̃ of every drawn id
                -> (``teacher_mix`` 0: log p by a scoring pass of the teacher) -> PolicyTerms
    loss        fused reverse KL with the single-step weights, fused LM loss with the policy gradient's weights

A token costs two student forward passes (drawing, training) and two of the teacher (drawing or scoring, training); with
``inner_epochs`` the drawing is shared by as many steps, and the rollouts are part of the checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch, moved
from megatron_kd.losses.divergences import ReverseKL
from megatron_kd.losses.fused_linear import linear_distillation_loss
from megatron_kd.losses.types import LM_ONLY, DenseKnowledge, DistillationObjective, LossOutput
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage, sum_over_group
from megatron_kd.teachers.interface import Teacher
from megatron_kd.training.distillation_config import LossConfig
from megatron_kd.training.methods import policy_gradient as pg
from megatron_kd.training.methods.generated_text import (
    GeneratedText,
    PolicyMaker,
    RolloutGenerator,
    Texts,
    gather_rows,
    gather_values,
    own_row_numbers,
    text_of,
)
from megatron_kd.training.methods.method_builders import MethodParts
from megatron_kd.training.methods.method_table import MiniLLMConfig
from megatron_kd.training.methods.source import Place, StepBatches, TextCounts
from megatron_kd.training.objective import FusedLoss, Knowledge, LossSums, sequence_major


def build_source(parts: MethodParts) -> "MiniLLMSource":
    """Build the source of MiniLLM's micro-batches."""
    settings: MiniLLMConfig = parts.settings
    mix = settings.teacher_mix
    policy = parts.mixed_policy(mix) if mix > 0 else parts.student_policy(record=True)
    assert parts.teacher is not None  # the method needs one: checked with the configuration
    return MiniLLMSource(
        settings,
        parts.rollout_generator(),
        policy,
        parts.teacher,
        parts.groups,
        global_batch_size=parts.config.training.global_batch_size,
        execution=parts.config.distillation.loss,
    )


def build_loss(parts: MethodParts) -> "MiniLLMLoss":
    """Build the loss of MiniLLM's micro-batches."""
    return MiniLLMLoss(parts.settings, parts.fused)


@dataclass(frozen=True)
class Rollout:
    """Payload of a micro-batch on the last pipeline stage: generated text, and what its policy gradient is made of.

    Attributes:
        text: the sequences, with log q, log p and log p̃ of every drawn id.
        terms: what the loss is made of.
        rewards: [b, s], log p - log q of the drawn ids, by the policy that drew them.
    """

    role: ClassVar[str] = "main"
    text: GeneratedText
    terms: pg.PolicyTerms
    rewards: Tensor

    def to(self, device: torch.device | str) -> "Rollout":
        """Return the payload with its tensors on another device."""
        return Rollout(self.text.to(device), self.terms.to(device), moved(self.rewards, device))


class MiniLLMSource:
    """Rolls out every step, or once for every block of ``inner_epochs`` global batches.

    Args:
        policy: draws the responses and records ``log_q``; a mixture also ``log_p`` and ``log_mixed``.
        teacher: scores the responses where the student alone drew them (``teacher_mix`` 0).
        execution: how the fused loss runs in that scoring pass.
    """

    def __init__(
        self,
        config: MiniLLMConfig,
        generator: RolloutGenerator,
        policy: PolicyMaker,
        teacher: Teacher,
        groups: ProcessGroupCollection,
        *,
        global_batch_size: int,
        execution: LossConfig | None = None,
    ) -> None:
        self._config, self._generator, self._policy = config, generator, policy
        self._teacher, self._groups = teacher, groups
        self._execution = execution or LossConfig()
        self._global_batch_size = global_batch_size
        self.counts = TextCounts()
        self._rollouts: list[Batch] | None = None
        self._kept: dict[str, np.ndarray] = {}
        self._block: int | None = None

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        block = place.position // self._config.inner_epochs
        if block != self._block:
            self._rollouts, self._block = self._roll_out(place, dataset), block
            if self._config.inner_epochs > 1:
                self._kept = gather_rollouts(self._rollouts, block, self._groups)
        elif self._rollouts is None:
            self._rollouts = split_rollouts(self._kept, self._generator, dataset, self._groups)
        made = self._with_terms(self._rollouts) if is_last_stage(self._groups) else self._rollouts
        return StepBatches(list(made), {"origin": "mixed" if self._config.teacher_mix else "student"})

    def _roll_out(self, place: Place, dataset: Sequence[Batch]) -> list[Batch]:
        self.counts.student += self._global_batch_size
        self.counts.teacher += self._global_batch_size
        made = self._generator.generate(self._policy, dataset, place.position, "rollout")
        return self._scored(made) if self._config.teacher_mix == 0 else made

    def _scored(self, made: Sequence[Batch]) -> list[Batch]:
        """Add the teacher's log-probabilities, by a forward pass over the whole sequences."""
        self._teacher.begin_step(made, scheduled=False)
        scored = []
        for batch in made:
            knowledge = self._teacher.knowledge(batch)
            text = text_of(batch)
            known = dict(text.log_probabilities)
            if is_last_stage(self._groups):
                whole = cast(DenseKnowledge, knowledge)  # the method refuses any other with the configuration
                known |= {"log_p": teacher_log_probabilities(batch, whole, self._groups, self._execution)}
                known |= {"log_mixed": known["log_q"]}
            scored.append(replace(batch, payload=GeneratedText(text.texts, known)))
        return scored

    def _with_terms(self, made: Sequence[Batch]) -> list[Batch]:
        drawn = [
            pg.Drawn(**{name: text_of(batch).log_probabilities[name] for name in RECORDED}, mask=batch.loss_mask)
            for batch in made
        ]
        if self._config.variant == "paper":
            terms = [pg.paper_terms(one, self._config) for one in drawn]
        else:
            terms = self._released_terms(made, drawn)
        return [
            replace(batch, payload=Rollout(text_of(batch), term, pg.rewards(one)))
            for batch, term, one in zip(made, terms, drawn)
        ]

    def _released_terms(self, made: Sequence[Batch], drawn: Sequence[pg.Drawn]) -> list[pg.PolicyTerms]:
        """Whiten the advantages over the global batch, the places after a response's end among them."""
        advantages = [pg.released_rewards_to_come(one, self._config) for one in drawn]
        sums, places = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for values, batch in zip(advantages, made):
            part, count = pg.moments(values, batch.loss_mask, self._generator.response_places(text_of(batch).texts))
            sums, places = sums + part.cpu(), places + count
        together = torch.cat([sums, places.unsqueeze(0)]).to(drawn[0].mask.device)
        together = sum_over_group(together, self._groups.dp)
        mean, variance = pg.mean_and_variance(together[:2], together[2])
        return [
            pg.PolicyTerms(
                ratio=pg.importance_ratio(one.log_q, one.log_mixed, one.mask, self._config.importance),
                advantages=pg.whitened(values, mean, variance).to(values) * one.mask,
                single_step_weights=one.mask,
            )
            for values, one in zip(advantages, drawn)
        ]

    def after_evaluation(self, loss: float) -> None:
        """Do nothing: MiniLLM does not depend on the held-out loss."""

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the counts, and the rollouts that later steps need; others follow from weights and position."""
        return {"texts": self.counts.to_array(), **self._kept}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        self.counts = TextCounts.from_array(state["texts"])
        self._rollouts = None
        self._kept = {name: values for name, values in state.items() if name.startswith(_PREFIX)}
        self._block = int(self._kept[_BLOCK]) if self._kept else None


class MiniLLMLoss:
    """The loss of a rollout micro-batch: policy gradient and, for each next token, the reverse KL.

    Reports beside the usual sums: the policy term, the reward, how much of the policy term was clipped.
    """

    extra: tuple[str, ...] = ("policy", "reward", "clipped")
    uses_teacher = True

    def __init__(self, config: MiniLLMConfig, fused: FusedLoss) -> None:
        self._config, self._fused = config, fused
        self._single_step = DistillationObjective(lm_weight=0.0, kd_weight=1.0, divergence=ReverseKL())

    def count(self, batch: Batch) -> Tensor:
        """Return what a micro-batch adds to the divisor: responses (``paper``) or their tokens (``released``)."""
        responses = batch.loss_mask.sum(1) > 0
        return responses.sum() if self._config.variant == "paper" else (batch.loss_mask > 0).sum()

    def __call__(
        self, batch: Batch, model: HiddenStateGPTModel, hidden: Tensor, knowledge: Knowledge | None
    ) -> LossSums:
        """See :class:`~megatron_kd.training.objective.BatchLoss`."""
        rollout = cast(Rollout, batch.payload)
        terms, mask = self._terms(batch, rollout, model, hidden), batch.loss_mask
        value, coefficient = pg.surrogate(terms.ratio, terms.advantages, self._config.clip)
        policy = self._fused(batch, model, hidden, sequence_major(coefficient * mask), LM_ONLY)
        weights = sequence_major(terms.single_step_weights * mask)
        # The fused loss adds to main_grad at once, so a term that is only reported is computed without gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._config.single_step):
            exact = self._fused(batch, model, hidden, weights, self._single_step, knowledge)
        assert exact.kd_sum is not None and exact.teacher_entropy_sum is not None  # the teacher gives all of p
        policy_value = -(value * mask).sum()
        loss, total = policy.loss_sum, policy_value
        if self._config.single_step:
            loss, total = loss + exact.loss_sum, total + exact.kd_sum
        reported = {
            "loss": total,
            "kd": exact.kd_sum,
            "teacher_entropy": exact.teacher_entropy_sum,
            "tokens": mask.sum(),
            "policy": policy_value,
            "reward": rollout.rewards.sum(),
            "clipped": ((coefficient == 0) & (terms.ratio * terms.advantages != 0)).sum(),
        }
        return LossSums(loss, self.count(batch), reported)

    def _terms(self, batch: Batch, rollout: Rollout, model: HiddenStateGPTModel, hidden: Tensor) -> pg.PolicyTerms:
        """Return the rollout's terms; with inner epochs, weighted by the policy that is being trained."""
        if self._config.inner_epochs == 1:
            return rollout.terms
        mask = batch.loss_mask
        with torch.no_grad():
            result = self._fused(batch, model, hidden, sequence_major(mask), LM_ONLY)
        log_q = label_log_probabilities(result, batch)
        log_drawn = rollout.text.log_probabilities["log_mixed"]
        ratio = pg.importance_ratio(log_q, log_drawn, mask, self._config.importance)
        weights = ratio if self._config.variant == "paper" else 1.0
        return pg.PolicyTerms(ratio, rollout.terms.advantages, weights * mask)


def label_log_probabilities(result: LossOutput, batch: Batch) -> Tensor:
    """Return the log-probability of every label [b, s], 0 outside the mask, from a loss without gradients."""
    assert result.token_lm_losses is not None  # given where gradients are off
    rows, length = batch.tokens.shape
    return -result.token_lm_losses.view(length, rows).transpose(0, 1)


@torch.no_grad()
def teacher_log_probabilities(
    batch: Batch, knowledge: DenseKnowledge, groups: ProcessGroupCollection, execution: LossConfig
) -> Tensor:
    """Return log p of every label [b, s], 0 outside the mask, from the teacher's hidden states."""
    result = linear_distillation_loss(
        knowledge.hidden,
        knowledge.head,
        sequence_major(batch.labels),
        sequence_major(batch.loss_mask),
        tp_group=groups.tp,
        tile_bytes=execution.tile_bytes,
        backend=execution.backend,
    )
    return label_log_probabilities(result, batch)


RECORDED = ("log_q", "log_p", "log_mixed")
_TEXTS = ("tokens", "lengths", "prompt_lengths")
_PREFIX = "rollout_"
_BLOCK = _PREFIX + "block"


def gather_rollouts(made: Sequence[Batch], block: int, groups: ProcessGroupCollection) -> dict[str, np.ndarray]:
    """Return the rollouts of all ranks in the order of the global batch, and the number of the block they serve.

    Equal on every rank: what a checkpoint keeps. Collective over the model's ranks.
    """
    texts = gather_rows(Texts.joined([text_of(batch).texts for batch in made]), len(made), groups)
    arrays = {_BLOCK: np.array(block)}
    arrays |= {_PREFIX + name: getattr(texts, name).int().cpu().numpy() for name in _TEXTS}
    for name in RECORDED:
        values = gather_values(_recorded(made, name, groups), len(made), groups)
        arrays[_PREFIX + name] = values.cpu().numpy()
    return arrays


def _recorded(made: Sequence[Batch], name: str, groups: ProcessGroupCollection) -> Tensor:
    """Send fp32 [rows, s] from the last pipeline stage, where it was recorded, to all."""
    if is_last_stage(groups):
        values = torch.cat([text_of(batch).log_probabilities[name] for batch in made]).float().contiguous()
    else:
        values = torch.cat([torch.empty_like(batch.loss_mask) for batch in made])
    if groups.pp.size() > 1:
        torch.distributed.broadcast(values, group=groups.pp, group_src=groups.pp.size() - 1)
    return values


def split_rollouts(
    arrays: Mapping[str, np.ndarray],
    generator: RolloutGenerator,
    dataset: Sequence[Batch],
    groups: ProcessGroupCollection,
) -> list[Batch]:
    """Return this rank's micro-batches of :func:`gather_rollouts`' arrays, one for each of ``dataset``'s."""
    index = own_row_numbers(len(arrays[_PREFIX + "lengths"]), len(dataset), groups)
    texts = Texts(*(torch.from_numpy(arrays[_PREFIX + name]).long() for name in _TEXTS))
    made = generator.as_micro_batches(texts.rows(index), dataset)
    if not is_last_stage(groups):
        return made
    device = made[0].tokens.device
    recorded = {name: torch.from_numpy(arrays[_PREFIX + name])[index].to(device) for name in RECORDED}
    starts = np.cumsum([0, *(len(batch.chunk_indices) for batch in made)])
    return [
        replace(
            batch,
            payload=GeneratedText(text_of(batch).texts, {name: values[a:b] for name, values in recorded.items()}),
        )
        for batch, a, b in zip(made, starts, starts[1:])
    ]
