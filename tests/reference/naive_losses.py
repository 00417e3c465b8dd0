"""Every loss of the project written out in float64 over whole [tokens, vocabulary] tensors, on one rank.

Nothing here is tiled, sharded, fused or shared with the package: values come from the definitions, gradients from
autograd. Used by tests and benchmarks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NaiveResult:
    """Token values [n] float64, with the graph attached."""

    lm: Tensor
    kd: Tensor | None
    entropy: Tensor | None

    def loss_sum(self, weights: Tensor, lm_weight: float, kd_weight: float) -> Tensor:
        counted = weights != 0
        total = lm_weight * (torch.where(counted, self.lm, 0.0) * weights.double()).sum()
        if self.kd is not None:
            total = total + kd_weight * (torch.where(counted, self.kd, 0.0) * weights.double()).sum()
        return total


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """All logits of all tokens, float64."""
    z = hidden.double() @ weight.double().t()
    if bias is not None:
        z = z + bias.double()
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def masked_log_softmax(z: Tensor, vocab_size: int, width: int | None = None) -> Tensor:
    """log softmax over the ids below ``vocab_size``, -inf elsewhere; cut or padded to ``width`` columns."""
    masked = z.masked_fill(torch.arange(z.shape[1]) >= vocab_size, -torch.inf)
    log_probabilities = torch.log_softmax(masked, -1)
    if width is None:
        return log_probabilities
    padding = log_probabilities.new_full((z.shape[0], max(0, width - z.shape[1])), -torch.inf)
    return torch.cat([log_probabilities[:, :width], padding], 1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per row; ids with a = 0 contribute nothing, and no NaN to the gradient."""
    a = log_a.exp()
    keep = torch.isfinite(log_a)
    return (a * (log_a.masked_fill(~keep, 0.0) - log_b.masked_fill(~keep, 0.0))).sum(-1)


def mix(log_a: Tensor, weight_a: float, log_b: Tensor) -> Tensor:
    """log(weight_a a + (1 - weight_a) b); weight 0 or 1 gives one side."""
    if weight_a == 0:
        return log_b
    if weight_a == 1:
        return log_a
    floor = -1.0e30  # logaddexp of two -inf has a NaN gradient
    mixed = torch.logaddexp(
        log_a.clamp_min(floor) + math.log(weight_a), log_b.clamp_min(floor) + math.log(1 - weight_a)
    )
    return mixed.masked_fill(mixed < floor / 2, -torch.inf)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m)."""
    m = mix(log_p, beta, log_q)
    return beta * kl(log_p, m) + (1 - beta) * kl(log_q, m)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "forward_kl": lambda log_p, log_q, beta, alpha: kl(log_p, log_q),
    "reverse_kl": lambda log_p, log_q, beta, alpha: kl(log_q, log_p),
    "jsd": lambda log_p, log_q, beta, alpha: jsd(log_p, log_q, beta),
    "skew_forward_kl": lambda log_p, log_q, beta, alpha: kl(log_p, mix(log_p, alpha, log_q)),
    "skew_reverse_kl": lambda log_p, log_q, beta, alpha: kl(log_q, mix(log_q, alpha, log_p)),
    "tvd": lambda log_p, log_q, beta, alpha: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
}
"""Per token, from the definitions: one row for each line of the package's table."""


def divergence(name: str, log_p: Tensor, log_q: Tensor, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    """Per token, of one name or a mixture."""
    if name in DIVERGENCES:
        return DIVERGENCES[name](log_p, log_q, beta, alpha)
    terms = [term.split("*") for term in name.split("+")]
    return sum(float(weight) * DIVERGENCES[part](log_p, log_q, beta, alpha) for weight, part in terms)


def sparse_loss(kind: str, ids: Tensor, weights: Tensor, tail: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor | None]:
    """(value, target entropy) per token."""
    present = (ids >= 0) & (ids < log_q.shape[1])
    safe = torch.where(present, ids, 0)
    chosen = log_q.gather(1, safe)
    present &= torch.isfinite(chosen)
    chosen = chosen.masked_fill(~present, 0.0)
    t = torch.where(present, weights.double(), 0.0)
    if kind in ("sampled", "weighted"):
        return -(t * chosen).sum(-1), None
    if kind == "renormalised":
        t = t / t.sum(-1, keepdim=True)
        entropy = -torch.xlogy(t, t).sum(-1)
        return -(t * chosen).sum(-1) - entropy, entropy
    inside = torch.zeros_like(log_q, dtype=torch.bool)
    inside[torch.arange(len(ids)).unsqueeze(1).expand_as(ids)[present], ids[present]] = True
    log_outside = torch.logsumexp(log_q.masked_fill(inside, -torch.inf), -1)
    tail = tail.double()
    entropy = -torch.xlogy(t, t).sum(-1) - torch.xlogy(tail, tail)
    tail_term = torch.where(tail > 0, tail * log_outside, 0.0)
    return -(t * chosen).sum(-1) - tail_term - entropy, entropy


def lm_loss(z: Tensor, vocab_size: int, labels: Tensor) -> Tensor:
    """-log q(label) per token; labels outside of the vocabulary read the logit of id 0 (mask them)."""
    safe = torch.where((labels >= 0) & (labels < vocab_size), labels, 0)
    return -masked_log_softmax(z, vocab_size).gather(1, safe.unsqueeze(1)).squeeze(1)


def dense(
    z_s: Tensor, valid_s: int, z_t: Tensor, valid_t: int, labels: Tensor, name: str, temperature: float = 1.0,
    beta: float = 0.5, alpha: float = 0.1,
) -> NaiveResult:  # fmt: skip
    """LM over the student's vocabulary, KD over the common one, both from whole logits."""
    common = min(valid_s, valid_t)
    log_q = masked_log_softmax(z_s / temperature, common)[:, :common]
    log_p = masked_log_softmax(z_t / temperature, common)[:, :common]
    entropy = -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    return NaiveResult(lm_loss(z_s, valid_s, labels), divergence(name, log_p, log_q, beta, alpha), entropy)


def sparse(
    z_s: Tensor, valid_s: int, ids: Tensor, weights: Tensor, tail: Tensor, labels: Tensor, kind: str,
    temperature: float = 1.0, valid_t: int | None = None,
) -> NaiveResult:  # fmt: skip
    """LM over the student's vocabulary and a sparse target over the common one, from whole logits."""
    common = valid_s if valid_t is None else min(valid_s, valid_t)
    kd, entropy = sparse_loss(kind, ids, weights, tail, masked_log_softmax(z_s / temperature, common))
    return NaiveResult(lm_loss(z_s, valid_s, labels), kd, entropy)
