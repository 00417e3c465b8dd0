r"""Divergences between a teacher's distribution p and a student's q: each one is a pure function of log p and log q.

Every divergence here is a sum over the vocabulary, ``D = sum_v F(p_v, q_v)``, so its gradient with respect to the
student's logits z is

    dD/dz_v = r_v - q_v * sum_u r_u        with the slope  r_v = q_v * dF/dq_v  (up to a multiple of q_v),

and a function needs to give only the rows of F summed over this rank's ids, and r. A weighted mixture is the weighted
sum of both. Shapes: log p and log q [rows, R] fp32, summed result [rows], slope [rows, R]. Masked ids are not among
the R columns, and both are finite: the caller raises logits of -inf to a floor whose exponential is 0. The functions do
no collectives: the caller adds up over the tensor-parallel group what they return.

``raw_sums`` marks the two divergences whose value can be had from the same pass that sums the exponentials, before
log p and log q are known: they need one all-reduce less.

Sources: forward and reverse KL; JSD(beta) as in GKD (arXiv 2306.13649), the true one for every beta; skew KLs as in
DistiLLM (arXiv 2402.03898).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_kd.errors import ConfigError


class Divergence(Protocol):
    """A pure function of (log p, log q). ``name`` is the config string."""

    @property
    def name(self) -> str: ...

    @property
    def raw_sums(self) -> bool: ...

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """(sum over columns of F [rows], slope r [rows, R])."""
        ...


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


@dataclass(frozen=True)
class ForwardKL:
    """KL(p || q) = sum p (log p - log q); slope -p; gradient q - p."""

    name: str = "forward_kl"
    raw_sums: bool = True

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        return _row_dot(p, log_p - log_q), p.neg_()


@dataclass(frozen=True)
class ReverseKL:
    """KL(q || p) = sum q (log q - log p); slope q (log q - log p); gradient q (log(q / p) - KL)."""

    name: str = "reverse_kl"
    raw_sums: bool = True

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        slope = (log_q - log_p).mul_(log_q.exp())
        return slope.sum(-1), slope


@dataclass(frozen=True)
class JensenShannon:
    """JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1.

    Slope (1 - beta) q log(q / m). beta weighs the teacher. JSD_beta -> 0 at both ends; divided by beta (1 - beta) it
    tends to the forward (reverse) KL there. No special case is made of 0 and 1: they are refused.
    """

    beta: float = 0.5
    name: str = "jsd"
    raw_sums: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"jsd needs 0 < beta < 1, not {self.beta}: it is 0 at the ends; use forward_kl or reverse_kl"
            )

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = log_mixture(log_p, self.beta, log_q, 1 - self.beta)
        teacher_part = _row_dot(log_p.exp(), log_p - log_m)
        slope = torch.sub(log_q, log_m, out=log_m).mul_(log_q.exp()).mul_(1 - self.beta)
        return teacher_part.mul_(self.beta).add_(slope.sum(-1)), slope


@dataclass(frozen=True)
class SkewForwardKL:
    """KL(p || m) with m = alpha p + (1 - alpha) q, 0 <= alpha < 1; slope -(1 - alpha) p q / m."""

    alpha: float = 0.1
    name: str = "skew_forward_kl"
    raw_sums: bool = False

    def __post_init__(self) -> None:
        _check_skew(self.name, self.alpha)

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = log_mixture(log_p, self.alpha, log_q, 1 - self.alpha)
        value = _row_dot(log_p.exp(), log_p - log_m)
        slope = torch.sub(log_q, log_m, out=log_m).add_(log_p).exp_().mul_(self.alpha - 1)
        return value, slope


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(q || n) with n = (1 - alpha) p + alpha q, 0 <= alpha < 1; slope q (log(q / n) - alpha q / n)."""

    alpha: float = 0.1
    name: str = "skew_reverse_kl"
    raw_sums: bool = False

    def __post_init__(self) -> None:
        _check_skew(self.name, self.alpha)

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_n = log_mixture(log_q, self.alpha, log_p, 1 - self.alpha)
        log_ratio = torch.sub(log_q, log_n, out=log_n)
        q = log_q.exp()
        value = _row_dot(q, log_ratio)
        # alpha q / n <= 1 however small n is; with alpha = 0 the term is absent, and q / n may be infinite
        slope = log_ratio.sub_(log_ratio.exp().mul_(self.alpha)) if self.alpha > 0 else log_ratio
        return value, slope.mul_(q)


@dataclass(frozen=True)
class TotalVariation:
    """TVD = 1/2 sum |p - q|; slope q * sign(q - p) / 2. Not differentiable where p = q: slope 0 there."""

    name: str = "tvd"
    raw_sums: bool = False

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        difference = q - log_p.exp()
        return difference.abs().sum(-1).mul_(0.5), difference.sign_().mul_(0.5).mul_(q)


@dataclass(frozen=True)
class Mixture:
    """sum_i weight_i * D_i, of any divergences; the weights are positive, used as given, and need not add up to 1."""

    parts: tuple[tuple[float, Divergence], ...]
    name: str = "mixture"

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("a mixture of divergences needs at least one part")
        for weight, part in self.parts:
            if not 0 < weight < math.inf:
                raise ConfigError(f"the weight of {part.name} in a mixture must be positive and finite, not {weight}")

    @property
    def raw_sums(self) -> bool:
        return all(part.raw_sums for _, part in self.parts)

    def value_and_slope(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        (first_weight, first), *rest = self.parts
        value, slope = first.value_and_slope(log_p, log_q)
        value, slope = value.mul_(first_weight), slope.mul_(first_weight)
        for weight, part in rest:
            part_value, part_slope = part.value_and_slope(log_p, log_q)
            value.add_(part_value, alpha=weight)
            slope.add_(part_slope, alpha=weight)
        return value, slope


def kl_weights(divergence: Divergence) -> tuple[float, float]:
    """(weight of forward KL, weight of reverse KL) of a divergence whose ``raw_sums`` is true."""
    if isinstance(divergence, Mixture):
        pairs = [(weight, kl_weights(part)) for weight, part in divergence.parts]
        return sum(w * f for w, (f, _) in pairs), sum(w * r for w, (_, r) in pairs)
    return (1.0, 0.0) if isinstance(divergence, ForwardKL) else (0.0, 1.0)


def log_mixture(log_a: Tensor, weight_a: float, log_b: Tensor, weight_b: float) -> Tensor:
    """log(weight_a * a + weight_b * b) as a new tensor, without underflow; a weight of 0 drops its side."""
    if weight_a == 0:
        return log_b.clone()
    return torch.logaddexp(log_a + math.log(weight_a), log_b + math.log(weight_b))


def divergence_from_config(name: str, beta: float = 0.5, skew_alpha: float = 0.1) -> Divergence:
    """The divergence of a config string.

    Args:
        name: ``forward_kl``, ``reverse_kl``, ``jsd``, ``skew_forward_kl``, ``skew_reverse_kl`` or ``tvd``; or a
            weighted mixture of them, ``0.9*forward_kl+0.1*reverse_kl``.
        beta: of ``jsd``, the teacher's weight.
        skew_alpha: of the skew KLs.

    Raises:
        ConfigError: unknown name, or a parameter out of its range.
    """
    makers = {
        "forward_kl": ForwardKL,
        "reverse_kl": ReverseKL,
        "jsd": lambda: JensenShannon(beta),
        "skew_forward_kl": lambda: SkewForwardKL(skew_alpha),
        "skew_reverse_kl": lambda: SkewReverseKL(skew_alpha),
        "tvd": TotalVariation,
    }
    if name in makers:
        return makers[name]()
    parts = []
    for term in name.split("+"):
        weight, _, part = term.rpartition("*")
        try:
            parts.append((float(weight), makers[part.strip()]()))
        except (KeyError, ValueError):
            raise ConfigError(
                f"unknown divergence {name!r}: use one of {', '.join(makers)}, or a mixture such as "
                f"'0.9*forward_kl+0.1*reverse_kl'"
            ) from None
    return Mixture(tuple(parts))


def _check_skew(name: str, alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ConfigError(f"{name} needs 0 <= skew_alpha < 1, not {alpha}")
