"""The policy gradient against autograd over all sequences of a vocabulary of 4 and a length of 3."""

import pytest
import torch

from megatron_kd.training.methods import policy_gradient as pg
from megatron_kd.training.methods.method_table import MiniLLMConfig
from tests.reference import naive_minillm as naive

EXACT = MiniLLMConfig(importance="sequence", clip=None, length_norm=False)


def expected_gradient(student, teacher, alpha, config):
    """Our terms of every sequence, weighted by its probability of being drawn."""
    index = {prefix: i for i, prefix in enumerate(naive.prefixes())}
    q_table, p_table = student.softmax(-1), teacher.softmax(-1)
    kl = (q_table * (q_table / p_table).log()).sum(-1)
    exact_rows = q_table * ((q_table / p_table).log() - kl.unsqueeze(1))
    gradient = torch.zeros_like(student)
    for sequence in naive.sequences():
        length = len(sequence)
        log_q, log_p, mask = (torch.zeros(1, naive.LENGTH, dtype=torch.float64) for _ in range(3))
        log_q[0, :length] = naive.token_log_probabilities(student, sequence)
        log_p[0, :length] = naive.token_log_probabilities(teacher, sequence)
        mask[0, :length] = 1
        drawn = naive.mixed_log_probabilities(log_p, log_q, alpha) * mask
        terms = pg.paper_terms(pg.Drawn(log_q, log_p, drawn, mask), config)
        _, coefficient = pg.surrogate(terms.ratio, terms.advantages, config.clip)
        probability = drawn.sum().exp()
        for t, token in enumerate(sequence):
            row = index[sequence[:t]]
            score = -q_table[row]
            score = score.index_add(0, torch.tensor([token]), torch.ones(1, dtype=torch.float64))
            gradient[row] += probability * (
                terms.single_step_weights[0, t] * exact_rows[row] - coefficient[0, t] * score
            )
    return gradient


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7])
def test_whole_products_without_clip_and_length_norm_give_the_gradient_of_the_reverse_kl(alpha):
    student, teacher = naive.random_table(1).requires_grad_(), naive.random_table(2)
    (exact,) = torch.autograd.grad(naive.reverse_kl(student, teacher), student)
    ours = expected_gradient(student.detach(), teacher, alpha, EXACT)
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-10)
    assert exact.abs().max() > 0.05


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7])
@pytest.mark.parametrize(("clip", "length_norm"), [(None, False), (0.2, True), (0.05, False), (None, True)])
def test_token_weights_give_the_enumeration_of_the_papers_formula(alpha, clip, length_norm):
    student, teacher = naive.random_table(1), naive.random_table(2)
    expected = naive.paper_gradient_by_enumeration(student, teacher, alpha, clip, length_norm)
    ours = expected_gradient(student, teacher, alpha, MiniLLMConfig(clip=clip, length_norm=length_norm))
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)


def test_token_weights_are_biased_and_without_mixing_they_are_not():
    student, teacher = naive.random_table(1).requires_grad_(), naive.random_table(2)
    (exact,) = torch.autograd.grad(naive.reverse_kl(student, teacher), student)
    config = MiniLLMConfig(clip=None, length_norm=False)
    plain = expected_gradient(student.detach(), teacher, 0.0, config)
    torch.testing.assert_close(plain, exact, atol=1e-12, rtol=1e-10)
    assert (expected_gradient(student.detach(), teacher, 0.5, config) - exact).abs().max() > 1e-3


def test_released_advantages_against_the_written_out_formula():
    generator = torch.Generator().manual_seed(0)
    lengths, places, start = [5, 1, 3], 6, 2
    mask = torch.zeros(3, places + start, dtype=torch.float64)
    for row, length in enumerate(lengths):
        mask[row, start : start + length] = 1
    log_p, log_q = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    config = MiniLLMConfig(variant="released", reward_scaling=0.5, reward_clip=1.5, discount=0.9)
    values = pg.released_rewards_to_come(pg.Drawn(log_q, log_p, log_q, mask), config)
    sums, count = pg.moments(values, mask, 3 * places)
    ours = pg.whitened(values, *pg.mean_and_variance(sums, count)) * mask
    rewards = [(log_p - log_q)[row, start : start + n].tolist() for row, n in enumerate(lengths)]
    expected = naive.released_advantages(rewards, 0.5, 1.5, 0.9, [places] * 3)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            ours[row, start : start + length], torch.tensor(expected[row], dtype=torch.float64), atol=1e-9, rtol=1e-9
        )
    assert not (ours * (1 - mask)).any()


def test_surrogate_is_the_gradient_of_the_clipped_objective():
    log_new = torch.linspace(-0.6, 0.6, 13, dtype=torch.float64).repeat(2, 1).requires_grad_()
    advantages = torch.tensor([[1.5], [-0.7]], dtype=torch.float64).expand(2, 13)
    ratio = log_new.exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (expected,) = torch.autograd.grad(objective.sum(), log_new)
    value, coefficient = pg.surrogate(ratio.detach(), advantages, 0.2)
    torch.testing.assert_close(value, objective.detach())
    torch.testing.assert_close(coefficient, expected)


def test_nothing_but_padding_gives_zeros_and_no_nan():
    zeros, mask = torch.zeros(2, 4), torch.zeros(2, 4)
    minus = torch.full((2, 4), -torch.inf)
    for config in (MiniLLMConfig(), EXACT):
        terms = pg.paper_terms(pg.Drawn(zeros, minus, minus, mask), config)
        assert torch.equal(terms.ratio, torch.ones(2, 4)) and not terms.advantages.any()
        assert not terms.single_step_weights.any()
    values = pg.released_rewards_to_come(pg.Drawn(zeros, zeros, zeros, mask), MiniLLMConfig(variant="released"))
    moments = pg.moments(values, mask, 0.0)
    assert torch.isfinite(pg.whitened(values, *pg.mean_and_variance(*moments))).all()
