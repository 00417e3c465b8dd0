"""MiniLLM's policy gradient, as pure functions of the log-probabilities of a response's ids.

Notation: q student, p teacher, p̃ the policy that drew, y_t the id at place t of a response,
r_t = log p(y_t) - log q(y_t). The gradient of KL(q ‖ p) over whole responses is (arXiv 2306.08543, §2.2; derivation in
docs/methods.md)

    sum_t  ∇ KL(q_t ‖ p_t)  -  R_{t+1} ∇ log q(y_t),        R_{t+1} = sum of r_t' over t' > t

with responses drawn from q; drawn from p̃ they are weighted. Shapes: [b, s], ``mask`` 1 on the ids of responses, which
are contiguous in a row; all arrays fp32 or fp64, no gradients, no collectives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.data.batch import moved
from megatron_kd.training.methods.method_table import MiniLLMConfig


@dataclass(frozen=True)
class Drawn:
    """Log-probabilities [b, s] of drawn ids: under the student, the teacher, and the policy that drew them."""

    log_q: Tensor
    log_p: Tensor
    log_mixed: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PolicyTerms:
    """What a micro-batch's loss is made of.

    loss = sum of single_step_weights · KL(q_t ‖ p_t) - surrogate(ratio, advantages), both detached but for q.

    Attributes:
        ratio: q(y_t) / p̃(y_t), 1 outside the mask; ``sequence`` importance: their product over the response.
        advantages: what the policy term multiplies.
        single_step_weights: of the exact term.
    """

    ratio: Tensor
    advantages: Tensor
    single_step_weights: Tensor

    def to(self, device: torch.device | str) -> "PolicyTerms":
        """Return the terms on another device."""
        return PolicyTerms(
            moved(self.ratio, device), moved(self.advantages, device), moved(self.single_step_weights, device)
        )


def rewards(drawn: Drawn) -> Tensor:
    """Return r_t, 0 outside the mask."""
    return torch.where(drawn.mask > 0, drawn.log_p - drawn.log_q, 0.0)


def importance_ratio(log_q: Tensor, log_drawn: Tensor, mask: Tensor, importance: str) -> Tensor:
    """Return q(y_t) / p̃(y_t) of each id, or the product over a response, the same for each of its ids."""
    log_ratio = torch.where(mask > 0, log_q - log_drawn, 0.0)
    if importance == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    return torch.where(mask > 0, log_ratio.exp(), 1.0)


def sums_to_come(values: Tensor, discount: float = 1.0) -> Tensor:
    """Return S_t = values_t + discount · S_{t+1} along each row."""
    result, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        running = values[:, t] + discount * running
        result[:, t] = running
    return result


def paper_terms(drawn: Drawn, config: MiniLLMConfig) -> PolicyTerms:
    """Return the paper's terms: R_{t+1} without r_t, divided by the number of its rewards (``length_norm``)."""
    reward, mask = rewards(drawn), drawn.mask
    to_come = sums_to_come(reward) - reward
    if config.length_norm:
        to_come = to_come / (sums_to_come(mask) - mask).clamp_min(1.0)
    ratio = importance_ratio(drawn.log_q, drawn.log_mixed, mask, config.importance)
    return PolicyTerms(ratio, to_come * mask, ratio * mask)


def released_rewards_to_come(drawn: Drawn, config: MiniLLMConfig) -> Tensor:
    """Return the released code's advantages before whitening.

    Rewards are scaled and clipped, summed with r_t included and a discount, and divided by the number of ids left.
    """
    scaled = rewards(drawn) / config.reward_scaling
    scaled = scaled.clamp(-config.reward_clip, config.reward_clip)
    return sums_to_come(scaled, config.discount) / sums_to_come(drawn.mask).clamp_min(1.0) * drawn.mask


def whitened(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the values with mean 0 and variance 1 (the released code's epsilon)."""
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def moments(values: Tensor, mask: Tensor, places: float) -> tuple[Tensor, Tensor]:
    """Return sum and sum of squares of the masked values, [2], and the count ``places``.

    Summed over ranks they are what :func:`mean_and_variance` takes. Places outside the mask count as zeros, as in the
    released code.
    """
    inside = torch.where(mask > 0, values, 0.0).double()
    return torch.stack([inside.sum(), inside.square().sum()]), torch.tensor(places, dtype=torch.float64)


def mean_and_variance(sums: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over all places, those outside the mask being 0."""
    mean = sums[0] / places.clamp_min(1.0)
    return mean, (sums[1] / places.clamp_min(1.0) - mean.square()).clamp_min(0.0)


def surrogate(ratio: Tensor, advantages: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Return min(ratio · A, clamp(ratio) · A), and the coefficient of ∇ log q in its gradient (0 where clipped)."""
    plain = ratio * advantages
    if clip is None:
        return plain, plain
    clamped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(plain, clamped), torch.where(plain <= clamped, plain, 0.0)
