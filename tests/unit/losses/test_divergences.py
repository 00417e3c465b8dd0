"""Divergences as functions: values and gradients from the definitions, limits, mixtures, parameters."""

import pytest
import torch

from megatron_kd.errors import ConfigError
from megatron_kd.losses import (
    DistillationObjective,
    ForwardKL,
    JensenShannon,
    Mixture,
    OutputHead,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    divergence_from_config,
    linear_distillation_loss,
)
from tests.reference import naive_losses
from tests.reference.loss_cases import DIVERGENCES, MIXTURES, TARGETS, LossCase, build, whole_knowledge

ALL = [*DIVERGENCES, *MIXTURES]


def distributions(rows: int = 7, columns: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    log_p, log_q = torch.randn((2, rows, columns), generator=generator, dtype=torch.float64).log_softmax(-1)
    return log_p, log_q


def gradient(divergence, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    _, slope = divergence.value_and_slope(log_p, log_q)
    return slope - log_q.exp() * slope.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient_match_the_definition(name):
    log_p, log_q = distributions()
    z = log_q.clone().requires_grad_()
    value = naive_losses.divergence(name, log_p, z.log_softmax(-1), 0.3, 0.2)
    (expected,) = torch.autograd.grad(value.sum(), z)
    divergence = divergence_from_config(name, 0.3, 0.2)
    torch.testing.assert_close(divergence.value_and_slope(log_p, log_q)[0], value.detach())
    torch.testing.assert_close(gradient(divergence, log_p, log_q), expected)


@pytest.mark.parametrize("name", ALL)
def test_arguments_are_not_changed(name):
    log_p, log_q = distributions()
    before = log_p.clone(), log_q.clone()
    divergence_from_config(name, 0.3, 0.2).value_and_slope(log_p, log_q)
    assert torch.equal(log_p, before[0]) and torch.equal(log_q, before[1])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_distributions_have_no_divergence_and_others_have(name):
    log_p, log_q = distributions()
    divergence = divergence_from_config(name)
    assert divergence.value_and_slope(log_p, log_p)[0].abs().max() < 1e-14
    assert gradient(divergence, log_p, log_p).abs().max() < 1e-14
    assert (divergence.value_and_slope(log_p, log_q)[0] > 1e-3).all()


def test_jsd_over_beta_tends_to_forward_kl_and_over_its_complement_to_reverse_kl():
    log_p, log_q = distributions()
    for limit, beta, factor in ((ForwardKL(), 1e-6, 1e-6), (ReverseKL(), 1 - 1e-6, 1e-6)):
        value, _ = JensenShannon(beta).value_and_slope(log_p, log_q)
        torch.testing.assert_close(value / factor, limit.value_and_slope(log_p, log_q)[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(
            gradient(JensenShannon(beta), log_p, log_q) / factor, gradient(limit, log_p, log_q), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("alpha", [0.0, 1e-7])
@pytest.mark.parametrize(("skewed", "limit"), [(SkewForwardKL, ForwardKL()), (SkewReverseKL, ReverseKL())])
def test_skew_kls_tend_to_the_kls(skewed, limit, alpha):
    log_p, log_q = distributions()
    torch.testing.assert_close(
        skewed(alpha).value_and_slope(log_p, log_q)[0], limit.value_and_slope(log_p, log_q)[0], rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        gradient(skewed(alpha), log_p, log_q), gradient(limit, log_p, log_q), rtol=1e-4, atol=1e-6
    )


def test_jsd_is_symmetric_under_exchange_with_the_complement():
    log_p, log_q = distributions()
    torch.testing.assert_close(
        JensenShannon(0.3).value_and_slope(log_p, log_q)[0], JensenShannon(0.7).value_and_slope(log_q, log_p)[0]
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_of_the_logit_gradient_sum_to_zero(target, temperature):
    """With the identity as weight the hidden states are the logits."""
    case = LossCase(target, hidden=83, rows=83, teacher_rows=83, dtype=torch.float64, temperature=temperature)
    inputs = build(case)
    logits = inputs.hidden.clone().requires_grad_()
    identity = OutputHead(torch.eye(83, dtype=torch.float64), 83)
    linear_distillation_loss(
        logits, identity, inputs.labels, inputs.weights, case.objective, whole_knowledge(case, inputs)
    ).loss_sum.backward()
    assert logits.grad.abs().max() > 1e-3
    if target == "ghost":  # its fp32 mass and tail add up to 1 in fp32 only: the gradient is that of the sums as given
        assert logits.grad.sum(-1).abs().max() < 1e-6
    else:
        assert logits.grad.sum(-1).abs().max() < 1e-12


def test_mixtures_of_kls_need_no_normalised_probabilities():
    mixture = divergence_from_config("0.9*forward_kl+0.1*reverse_kl")
    assert mixture.kl_weights == (0.9, 0.1)
    nested = Mixture(((2.0, mixture), (0.5, ReverseKL())))
    assert nested.kl_weights == pytest.approx((1.8, 0.7))
    assert divergence_from_config("0.9*forward_kl+0.1*tvd").kl_weights is None


def test_config_strings_build_what_they_name():
    assert divergence_from_config("jsd", beta=0.2) == JensenShannon(0.2)
    assert divergence_from_config("skew_forward_kl", skew_alpha=0.3) == SkewForwardKL(0.3)
    assert divergence_from_config("skew_reverse_kl", skew_alpha=0.3) == SkewReverseKL(0.3)
    assert divergence_from_config("0.5*forward_kl + 0.5*tvd") == Mixture(((0.5, ForwardKL()), (0.5, TotalVariation())))
    assert DistillationObjective().divergence == ForwardKL()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("jsd", {"beta": 0.0}, "0 < beta < 1, not 0.0"),
        ("jsd", {"beta": 1.0}, "0 < beta < 1, not 1.0"),
        ("skew_forward_kl", {"skew_alpha": 1.0}, "skew_alpha < 1, not 1.0"),
        ("skew_reverse_kl", {"skew_alpha": -0.1}, "not -0.1"),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameters, message):
    with pytest.raises(ConfigError, match=message):
        divergence_from_config(name, **parameters)


def test_a_mixture_needs_parts_with_positive_weights():
    with pytest.raises(ConfigError, match="at least one part"):
        Mixture(())
    with pytest.raises(ConfigError, match="weight of TotalVariation in a mixture must be positive and finite, not 0"):
        Mixture(((0.0, TotalVariation()),))
