"""MiniLLM's policy gradient, as pure functions of the log-probabilities of a response's tokens.

Notation: q student, p teacher, y_t the token at place t of a response, r_t = log p(y_t) - log q(y_t). The gradient of
KL(q ‖ p) over whole responses is (arXiv 2306.08543, §2.2; derivation in docs/methods.md)

    sum_t  ∇ KL(q_t ‖ p_t)  -  R_{t+1} ∇ log q(y_t),        R_{t+1} = sum of r_t' over t' > t

with responses drawn from q; drawn from another distribution p̃ they are weighted. Shapes: [b, s], ``mask`` 1 on
response tokens, which are contiguous in a row; all arrays fp32 or fp64, no gradients, no collectives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.data.batch import moved
from megatron_kd.training.methods.method_config import MiniLLMConfig


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


def rewards(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """r_t, 0 outside the mask."""
    return torch.where(mask > 0, log_p - log_q, 0.0)


def importance_ratio(log_q: Tensor, log_drawn: Tensor, mask: Tensor, importance: str) -> Tensor:
    """q(y_t) / p̃(y_t) of each token, or the product of all of a response's, the same for each of its tokens."""
    log_ratio = torch.where(mask > 0, log_q - log_drawn, 0.0)
    if importance == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    return torch.where(mask > 0, log_ratio.exp(), 1.0)


def sums_to_come(values: Tensor, discount: float = 1.0) -> Tensor:
    """S_t = values_t + discount · S_{t+1} along each row."""
    result, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        running = values[:, t] + discount * running
        result[:, t] = running
    return result


def paper_terms(log_p: Tensor, log_q: Tensor, log_drawn: Tensor, mask: Tensor, config: MiniLLMConfig) -> PolicyTerms:
    """The paper's: R_{t+1} without r_t, divided by the number of its rewards (``length_norm``)."""
    reward = rewards(log_p, log_q, mask)
    to_come = sums_to_come(reward) - reward
    if config.length_norm:
        to_come = to_come / (sums_to_come(mask) - mask).clamp_min(1.0)
    ratio = importance_ratio(log_q, log_drawn, mask, config.importance)
    return PolicyTerms(ratio, to_come * mask, ratio * mask)


def released_rewards_to_come(log_p: Tensor, log_q: Tensor, mask: Tensor, config: MiniLLMConfig) -> Tensor:
    """The released code's, before whitening: scaled and clipped rewards, r_t included, discounted, over the tokens
    left."""
    scaled = rewards(log_p, log_q, mask) / config.reward_scaling
    scaled = scaled.clamp(-config.reward_clip, config.reward_clip)
    return sums_to_come(scaled, config.discount) / sums_to_come(mask).clamp_min(1.0) * mask


def whitened(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Mean 0, variance 1 (the released code's epsilon)."""
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def moments(values: Tensor, mask: Tensor, places: float) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of the masked values, as [2], and the count of ``places``: what :func:`mean_and_variance`
    needs after summing over ranks. Places outside the mask count as zeros, as in the released code."""
    inside = torch.where(mask > 0, values, 0.0).double()
    return torch.stack([inside.sum(), inside.square().sum()]), torch.tensor(places, dtype=torch.float64)


def mean_and_variance(sums: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of all places, the masked ones being 0."""
    mean = sums[0] / places.clamp_min(1.0)
    return mean, (sums[1] / places.clamp_min(1.0) - mean.square()).clamp_min(0.0)


def surrogate(ratio: Tensor, advantages: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Value of min(ratio · A, clamp(ratio) · A), and the coefficient of ∇ log q in its gradient (0 where clipped)."""
    plain = ratio * advantages
    if clip is None:
        return plain, plain
    clamped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(plain, clamped), torch.where(plain <= clamped, plain, 0.0)
