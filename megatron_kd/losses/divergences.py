r"""Divergences between a teacher's distribution p and a student's q: each one is a pure function of log p and log q.

Every divergence here is a sum over the vocabulary, ``D = sum_v F(p_v, q_v)``, so its gradient with respect to the
student's logits z is

    dD/dz_v = r_v - q_v * sum_u r_u        with the slope  r_v = q_v * dF/dq_v  (up to a multiple of q_v),

and a divergence only has to return F summed over this rank's ids, and r. A weighted mixture is the weighted sum of
both. Masked ids are not among the R columns. log p and log q are finite: the caller raises logits of -inf to a floor
whose exponential is 0. No collectives: the caller adds up over the tensor-parallel group what a divergence returns.

Names, parameters and sources are in :mod:`~megatron_kd.losses.divergence_table`.
"""

import importlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.divergence_table import DIVERGENCES, check_mixture_weight, parse_divergence


class Divergence(ABC):
    """A pure function of (log p, log q); subclass it to add your own (docs/extending.md)."""

    @abstractmethod
    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Return F summed over the columns [n] and the slope r [n, R], both new tensors.

        Args:
            log_p, log_q: [n, R] log-probabilities of the teacher and the student on this rank's ids, fp32 (fp64 for
                fp64 heads); they must not be changed.
        """

    @property
    def kl_weights(self) -> tuple[float, float] | None:
        """Weights of KL(p || q) and KL(q || p) where the divergence is a sum of these two, else None.

        The values of both come from the pass that sums the exponentials, before log p and log q are known, which saves
        an all-reduce.
        """
        return None


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q); slope -p; gradient q - p."""

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        return torch.linalg.vecdot(p, log_p - log_q), p.neg_()

    @property
    def kl_weights(self) -> tuple[float, float]:
        """KL(p || q) alone."""
        return (1.0, 0.0)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p); slope q (log q - log p); gradient q (log(q / p) - KL)."""

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        slope = (log_q - log_p).mul_(log_q.exp())
        return slope.sum(-1), slope

    @property
    def kl_weights(self) -> tuple[float, float]:
        """KL(q || p) alone."""
        return (0.0, 1.0)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1.

    Slope (1 - beta) q log(q / m). beta weighs the teacher. JSD_beta -> 0 at both ends; divided by beta (1 - beta) it
    tends to the forward (reverse) KL there. 0 and 1 are refused: the KLs have names of their own.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"jsd needs 0 < beta < 1, not {self.beta}: it is 0 at the ends; use forward_kl or reverse_kl"
            )

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = log_mixture(log_p, self.beta, log_q, 1 - self.beta)
        teacher_part = torch.linalg.vecdot(log_p.exp(), log_p - log_m)
        slope = torch.sub(log_q, log_m, out=log_m).mul_(log_q.exp()).mul_(1 - self.beta)
        return teacher_part.mul_(self.beta).add_(slope.sum(-1)), slope


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p || m) with m = alpha p + (1 - alpha) q, 0 <= alpha < 1; slope -(1 - alpha) p q / m."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_skew(self.alpha)

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = log_mixture(log_p, self.alpha, log_q, 1 - self.alpha)
        value = torch.linalg.vecdot(log_p.exp(), log_p - log_m)
        slope = torch.sub(log_q, log_m, out=log_m).add_(log_p).exp_().mul_(self.alpha - 1)
        return value, slope


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || n) with n = (1 - alpha) p + alpha q, 0 <= alpha < 1; slope q (log(q / n) - alpha q / n)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_skew(self.alpha)

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_n = log_mixture(log_q, self.alpha, log_p, 1 - self.alpha)
        log_ratio = torch.sub(log_q, log_n, out=log_n)
        q = log_q.exp()
        value = torch.linalg.vecdot(q, log_ratio)
        # alpha q / n <= 1 however small n is; with alpha = 0 the term is absent, and q / n may be infinite
        slope = log_ratio.sub_(log_ratio.exp().mul_(self.alpha)) if self.alpha > 0 else log_ratio
        return value, slope.mul_(q)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """TVD = 1/2 sum |p - q|; slope q * sign(q - p) / 2. Not differentiable where p = q: slope 0 there."""

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        difference = q - log_p.exp()
        return difference.abs().sum(-1).mul_(0.5), difference.sign_().mul_(0.5).mul_(q)


@dataclass(frozen=True)
class Mixture(Divergence):
    """sum_i weight_i * D_i, of any divergences; the weights are positive, used as given, and need not add up to 1."""

    parts: tuple[tuple[float, Divergence], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("a mixture of divergences needs at least one part")
        for weight, part in self.parts:
            check_mixture_weight(weight, type(part).__name__)

    @property
    def kl_weights(self) -> tuple[float, float] | None:
        """Sums of the parts' weights, None unless every part has them."""
        forward = reverse = 0.0
        for weight, part in self.parts:
            if part.kl_weights is None:
                return None
            forward += weight * part.kl_weights[0]
            reverse += weight * part.kl_weights[1]
        return forward, reverse

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        (first_weight, first), *rest = self.parts
        value, slope = first.value_and_slope(log_p, log_q)
        value, slope = value.mul_(first_weight), slope.mul_(first_weight)
        for weight, part in rest:
            part_value, part_slope = part.value_and_slope(log_p, log_q)
            value.add_(part_value, alpha=weight)
            slope.add_(part_slope, alpha=weight)
        return value, slope


def log_mixture(log_a: Tensor, weight_a: float, log_b: Tensor, weight_b: float) -> Tensor:
    """Return log(weight_a * a + weight_b * b), a new tensor, without underflow; ``weight_a`` 0 drops its side."""
    if weight_a == 0:
        return log_b.clone()
    return torch.logaddexp(log_a + math.log(weight_a), log_b + math.log(weight_b))


def divergence_from_config(name: str, beta: float = 0.5, skew_alpha: float = 0.1) -> Divergence:
    """Build the divergence of a config string.

    Args:
        name: a name of :data:`~megatron_kd.losses.divergence_table.DIVERGENCES`, or a weighted mixture of names such as
            ``0.9*forward_kl+0.1*reverse_kl``.
        beta: the teacher's weight in ``jsd``.
        skew_alpha: weight of the other distribution in the skew KLs.

    Raises:
        ConfigError: an unknown name, or a parameter out of its range.
    """
    parameters = {"beta": beta, "skew_alpha": skew_alpha}
    terms = parse_divergence(name)
    if name in DIVERGENCES:
        return _build(name, parameters)
    return Mixture(tuple((weight, _build(part, parameters)) for weight, part in terms))


def _build(name: str, parameters: dict[str, float]) -> Divergence:
    entry = DIVERGENCES[name]
    module, _, made_by = entry.made_by.partition(":")
    return getattr(importlib.import_module(module), made_by)(*(parameters[key] for key in entry.parameters))


def _check_skew(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ConfigError(f"a skew KL needs 0 <= skew_alpha < 1, not {alpha}")
