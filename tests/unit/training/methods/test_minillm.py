"""MiniLLM's and GKD's loss and gradients on small vocabularies against float64 autograd on whole logits."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_kd.config import from_mapping
from megatron_kd.losses import LM_ONLY, DenseKnowledge, DistillationObjective, OutputHead
from megatron_kd.training.distillation_config import DistillationConfig
from megatron_kd.training.methods import policy_gradient as pg
from megatron_kd.training.methods.generated_text import GeneratedText, Texts, text_of
from megatron_kd.training.methods.method_table import MiniLLMConfig
from megatron_kd.training.methods.minillm import MiniLLMLoss, Rollout
from megatron_kd.training.methods.pretraining import PretrainingLoss, PretrainingShare
from megatron_kd.training.objective import DistillationLoss, FusedLoss, MicroBatchLoss, build_objective
from tests.reference import naive_losses
from tests.unit.training.methods.made_batches import micro_batch

VOCABULARY, HIDDEN, LENGTH, ROWS = 7, 5, 6, 3
GROUPS = SimpleNamespace(tp=None, cp=None)


class Case:
    """Student and teacher hidden states and heads in float64, and a batch of prompts and responses."""

    def __init__(self, lengths=(7, 4, 6), prompts=(2, 2, 5)):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = randn(LENGTH, ROWS, HIDDEN).requires_grad_()
        self.weight = torch.nn.Parameter(randn(VOCABULARY, HIDDEN))
        self.teacher_hidden, self.teacher_weight = randn(LENGTH, ROWS, HIDDEN), randn(VOCABULARY, HIDDEN)
        self.model = SimpleNamespace(
            output_head=lambda: OutputHead(self.weight, VOCABULARY), config=SimpleNamespace(sequence_parallel=False)
        )
        self.knowledge = DenseKnowledge(self.teacher_hidden.flatten(0, 1), OutputHead(self.teacher_weight, VOCABULARY))
        ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        self.batch = micro_batch(Texts(ids, torch.tensor(lengths), torch.tensor(prompts)))
        self.mask = self.batch.loss_mask.double()

    def log_probabilities(self):
        """log q and log p [b, s, v], the first with its graph."""
        log_q = (self.hidden @ self.weight.t()).log_softmax(-1).transpose(0, 1)
        return log_q, (self.teacher_hidden @ self.teacher_weight.t()).log_softmax(-1).transpose(0, 1)

    def of_labels(self, values):
        return values.gather(2, self.batch.labels.unsqueeze(2)).squeeze(2)

    def rollout(self, config, alpha=0.3):
        log_q, log_p = (self.of_labels(values).detach() for values in self.log_probabilities())
        drawn = torch.log(alpha * log_p.exp() + (1 - alpha) * log_q.exp())
        known = pg.Drawn(log_q, log_p, drawn, self.mask)
        text = GeneratedText(text_of(self.batch).texts, {"log_mixed": drawn})
        rollout = Rollout(text, pg.paper_terms(known, config), pg.rewards(known))
        return dataclasses.replace(self.batch, payload=rollout), drawn

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.hidden, self.weight])


def sums_of(loss, batch, case, knowledge=None):
    """Loss, count and reported sums of a micro-batch."""
    sums = loss(batch, case.model, case.hidden, knowledge or case.knowledge)
    return sums.loss, sums.count, sums.reported


def minillm_loss(config):
    return MiniLLMLoss(config, FusedLoss(GROUPS))


@pytest.mark.parametrize("config", [MiniLLMConfig(), MiniLLMConfig(clip=None, single_step=False)])
def test_minillm_against_autograd_on_whole_logits(config):
    case = Case()
    batch, drawn = case.rollout(config)
    loss, count, sums = sums_of(minillm_loss(config), batch, case)
    ours = case.gradients(loss)
    log_q, log_p = case.log_probabilities()
    ratio = (case.of_labels(log_q) - drawn).exp()
    advantages = batch.payload.terms.advantages
    policy = ratio * advantages
    if config.clip is not None:
        policy = torch.minimum(policy, ratio.clamp(1 - config.clip, 1 + config.clip) * advantages)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = -(policy * case.mask).sum()
    if config.single_step:
        expected = expected + (ratio.detach() * kl * case.mask).sum()
    for mine, theirs in zip(ours, case.gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)
    assert float(sums["loss"]) == pytest.approx(float(expected), rel=1e-9)
    assert int(count) == ROWS and int(sums["tokens"]) == int(case.mask.sum())
    assert config.clip is None or 0 < int(sums["clipped"]) < int(case.mask.sum())


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_later_inner_epoch_weighs_by_the_policy_of_then(variant):
    """The policy moves between the rollout and the loss: ratios are of the new one, advantages of the old."""
    config = MiniLLMConfig(inner_epochs=2, variant=variant)
    case = Case()
    batch, drawn = case.rollout(config)
    with torch.no_grad():
        case.hidden += 0.3 * torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(1))
    loss, _, _ = sums_of(minillm_loss(config), batch, case)
    ours = case.gradients(loss)
    log_q, log_p = case.log_probabilities()
    ratio, advantages = (case.of_labels(log_q) - drawn).exp(), batch.payload.terms.advantages
    policy = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    weights = ratio.detach() if variant == "paper" else 1.0
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = ((weights * kl - policy) * case.mask).sum()
    for mine, theirs in zip(ours, case.gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    assert (batch.payload.terms.ratio - ratio)[case.mask > 0].abs().max() > 0.05


def test_a_single_step_that_is_left_out_adds_nothing_to_main_grad():
    config = MiniLLMConfig(clip=None, single_step=False)
    case = Case()
    batch, _ = case.rollout(config)
    policy, _, sums = sums_of(minillm_loss(config), batch, case)
    _, expected = case.gradients(policy)
    case.weight.main_grad = torch.zeros_like(case.weight)
    loss, _, _ = sums_of(minillm_loss(config), batch, case)
    loss.backward()
    torch.testing.assert_close(case.weight.main_grad, expected)
    assert float(sums["kd"]) > 0


@pytest.mark.parametrize(("beta", "name"), [(0.5, "jsd"), (0.1, "jsd"), (0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_gkd_against_autograd_on_whole_logits(beta, name):
    case = Case()
    objective = build_objective(DistillationConfig(method="gkd", beta=beta))
    loss, count, sums = sums_of(DistillationLoss(objective, FusedLoss(GROUPS), "token"), case.batch, case)
    ours = case.gradients(loss)
    log_q, log_p = case.log_probabilities()
    values = naive_losses.divergence(name, log_p.flatten(0, 1), log_q.flatten(0, 1), beta=beta)
    expected = (values * case.mask.flatten()).sum()
    for mine, theirs in zip(ours, case.gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)
    assert float(loss) == pytest.approx(float(expected), rel=1e-9) == float(sums["kd"])
    assert int(count) == int(case.mask.sum())


@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_distillm_against_autograd_on_whole_logits(name):
    case = Case()
    objective = build_objective(DistillationConfig(method="distillm", divergence=name))
    loss, _, _ = sums_of(DistillationLoss(objective, FusedLoss(GROUPS), "token"), case.batch, case)
    ours = case.gradients(loss)
    log_q, log_p = case.log_probabilities()
    values = naive_losses.divergence(name, log_p.flatten(0, 1), log_q.flatten(0, 1), alpha=0.1)
    for mine, theirs in zip(ours, case.gradients((values * case.mask.flatten()).sum()), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)


def test_defaults_of_the_methods():
    made = {name: build_objective(DistillationConfig(method=name)) for name in ("vanilla_kd", "gkd", "distillm")}
    assert (made["vanilla_kd"].lm_weight, made["gkd"].lm_weight, made["distillm"].lm_weight) == (0.5, 0.0, 0.0)
    names = {name: type(objective.divergence).__name__ for name, objective in made.items()}
    assert names == {"vanilla_kd": "ForwardKL", "gkd": "JensenShannon", "distillm": "SkewReverseKL"}
    keys = {"method": "minillm", "kd_ratio": 0.5, "pretraining_weight": 1.0}
    minillm = build_objective(from_mapping(DistillationConfig, keys, "test"))
    assert (minillm.lm_weight, minillm.kd_weight) == (0.5, 0.5)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_batch_of_empty_responses_has_loss_and_gradient_0(variant):
    case = Case(lengths=(7, 7, 7), prompts=(7, 7, 7))
    config = MiniLLMConfig(variant=variant)
    batch, _ = case.rollout(config)
    assert not batch.loss_mask.any() and int(minillm_loss(config).count(batch)) == 0
    loss, _, sums = sums_of(minillm_loss(config), batch, case)
    assert float(loss) == 0 and all(float(value) == 0 for value in sums.values())
    assert not any(gradient.any() for gradient in case.gradients(loss))


def test_the_pretraining_loss_beside_is_scaled_and_not_counted():
    case = Case()
    loss = PretrainingLoss(LM_ONLY, FusedLoss(GROUPS), "token")
    beside = dataclasses.replace(case.batch, payload=PretrainingShare(0.25))
    scaled, count, sums = sums_of(loss, beside, case)
    log_q, _ = case.log_probabilities()
    expected = -0.25 * (case.of_labels(log_q) * case.mask).sum()
    assert int(count) == 0 and float(scaled) == pytest.approx(float(expected), rel=1e-9) == float(sums["pretraining"])
    whole = MicroBatchLoss({"main": minillm_loss(MiniLLMConfig()), "pretraining": loss}, None)
    assert not whole.needs_knowledge(beside) and whole.needs_knowledge(case.batch)
    assert whole.extra == ("policy", "reward", "clipped", "pretraining")
    assert PretrainingLoss(DistillationObjective(kd_weight=0.5), FusedLoss(GROUPS), "token").uses_teacher
