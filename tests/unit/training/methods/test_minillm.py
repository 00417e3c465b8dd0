"""MiniLLM: the loss against float64 autograd on whole logits; rollouts, which steps share them, and restored ones."""

import numpy as np
import pytest
import torch

from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import MixedPolicy
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.distillation_config import RolloutConfig
from megatron_kd.training.methods.generated_text import RolloutGenerator, Texts
from megatron_kd.training.methods.method_table import MiniLLMConfig
from megatron_kd.training.methods.minillm import MiniLLMLoss, MiniLLMSource
from megatron_kd.training.methods.source import Place
from megatron_kd.training.objective import FusedLoss
from tests.reference import naive_minillm as naive
from tests.reference.one_rank import tiny_model
from tests.unit.training.methods.made_batches import (
    LOSS_GROUPS,
    Case,
    micro_batch,
    sums_of,
)

WIDTH, TEXTS = 15, 4


def minillm_loss(config):
    return MiniLLMLoss(config, FusedLoss(LOSS_GROUPS))


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
    assert int(count) == len(batch.loss_mask) and int(sums["tokens"]) == int(case.mask.sum())
    assert config.clip is None or 0 < int(sums["clipped"]) < int(case.mask.sum())


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_later_inner_epoch_weighs_by_the_policy_at_its_start(variant):
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


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_batch_of_empty_responses_has_loss_and_gradient_0(variant):
    case = Case(lengths=(7, 7, 7), prompts=(7, 7, 7))
    config = MiniLLMConfig(variant=variant)
    batch, _ = case.rollout(config)
    assert not batch.loss_mask.any() and int(minillm_loss(config).count(batch)) == 0
    loss, _, sums = sums_of(minillm_loss(config), batch, case)
    assert float(loss) == 0 and all(float(value) == 0 for value in sums.values())
    assert not any(gradient.any() for gradient in case.gradients(loss))


class PromptLengths:
    """As a blend of datasets gives them: for arrays of chunks, 0 where a chunk has no prompt of its own."""

    def __getitem__(self, chunks):
        assert len(chunks)
        return np.array([3, 9, 0, 14])[chunks]


class Prompts:
    """Four chunks with prompts of 3, 9 and 14 ids, and one without."""

    pad_id = eos_id = 0
    prompt_lengths = PromptLengths()

    def __getitem__(self, chunk):
        return np.arange(1, WIDTH + 2) + chunk


def prompt_batches():
    ids = torch.zeros(TEXTS, WIDTH + 1, dtype=torch.int64)
    return [micro_batch(Texts(ids, torch.full((TEXTS,), 2), torch.ones(TEXTS)))]


@pytest.fixture(scope="module")
def make_source():
    """Sources over one student and one teacher."""
    with distributed_runtime() as runtime:
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        groups = teacher.pg_collection = student.pg_collection

        def make(**keys):
            config = MiniLLMConfig(**keys)
            generator = RolloutGenerator(
                RolloutConfig(prompt_length=6), Prompts(), groups, seq_length=WIDTH, seed=5, device=runtime.device
            )

            def policy(rows, length):
                decoders = (Decoder([model], groups, rows, length) for model in (student, teacher))
                return MixedPolicy(*decoders, config.teacher_mix)

            return MiniLLMSource(config, generator, policy, None, groups, global_batch_size=TEXTS)

        yield make


def batch_of(source, position):
    (batch,) = source.batches(Place(position, 100, position), prompt_batches()).batches
    return batch


def test_prompts_are_the_chunks_own_or_the_first_ids(make_source):
    batch = batch_of(make_source(), 0)
    assert batch.payload.text.texts.prompt_lengths.tolist() == [3, 9, 6, 14]
    for row, length in enumerate((3, 9, 6, 14)):
        np.testing.assert_array_equal(batch.payload.text.texts.tokens[row, :length], np.arange(1, length + 1) + row)
        assert batch.loss_mask[row].sum() == batch.payload.text.texts.lengths[row] - length > 0


def test_released_advantages_are_whitened_over_the_places_that_each_prompt_leaves(make_source):
    config = MiniLLMConfig(variant="released")
    batch = batch_of(make_source(variant="released"), 0)
    texts, recorded = batch.payload.text.texts, batch.payload.text.log_probabilities
    rewards = (recorded["log_p"] - recorded["log_q"]).double()
    inside = [(int(n) - 1, int(end) - 1) for n, end in zip(texts.prompt_lengths, texts.lengths)]
    expected = naive.released_advantages(
        [rewards[row, a:b].tolist() for row, (a, b) in enumerate(inside)],
        config.reward_scaling, config.reward_clip, config.discount, [13, 7, 10, 2],
    )  # fmt: skip
    for row, (a, b) in enumerate(inside):
        found = batch.payload.terms.advantages[row, a:b].double()
        torch.testing.assert_close(found, torch.tensor(expected[row], dtype=torch.float64), atol=1e-4, rtol=1e-4)


def test_inner_epochs_share_rollouts_within_their_block_and_no_further(make_source):
    source = make_source(inner_epochs=3)
    tokens = [batch_of(source, position).tokens for position in range(5)]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[3], tokens[4]) and not torch.equal(tokens[0], tokens[3])
    assert source.counts.student == source.counts.teacher == 2 * TEXTS


def test_restored_rollouts_serve_the_rest_of_their_block_alone(make_source):
    """After a rollback the batches up to the spike are skipped: the kept rollouts may be of an earlier block."""
    source = make_source(inner_epochs=3)
    first = batch_of(source, 0)
    again, later = make_source(inner_epochs=3), make_source(inner_epochs=3)
    again.restore(source.state())
    later.restore(source.state())
    resumed = batch_of(again, 1)
    assert torch.equal(resumed.tokens, first.tokens) and again.counts.student == TEXTS
    for name, values in first.payload.text.log_probabilities.items():
        assert torch.equal(resumed.payload.text.log_probabilities[name], values), name
    assert torch.equal(resumed.payload.terms.advantages, first.payload.terms.advantages)
    assert not torch.equal(batch_of(later, 4).tokens, first.tokens) and later.counts.student == 2 * TEXTS
