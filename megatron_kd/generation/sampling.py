"""From next-token logits to the next token: temperature, top-k, top-p, and inversion of the cumulative distribution.

One uniform number a token, ids in ascending order: the token is the first whose cumulative probability exceeds the
number. Shapes: b sequences, v ids. No collectives.
"""

from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """0 means all."""
    top_p: float = 1.0

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.temperature < 0:
            yield f"the sampling temperature must not be negative, not {self.temperature}"
        if self.top_k < 0:
            yield f"top_k must be 0 (all) or above, not {self.top_k}"
        if not 0 < self.top_p <= 1:
            yield f"top_p must be in (0, 1], not {self.top_p}"

    @property
    def is_plain(self) -> bool:
        """Whether tokens come from the model's own distribution, unaltered."""
        return self.temperature == 1.0 and self.top_k == 0 and self.top_p == 1.0


def sampling_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Logits [b, v] of the distribution that is drawn from: divided by the temperature, -inf for what is left out.

    top_k keeps the k likeliest ids (and those equal to the last of them), then top_p the fewest of the likeliest ids
    whose probabilities reach p.
    """
    if config.temperature not in (0.0, 1.0):
        logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= config.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def choose(logits: Tensor, draws: Tensor, config: SamplingConfig) -> Tensor:
    """The next token of each sequence, int64 [b].

    Args:
        logits: [b, v], or log-probabilities.
        draws: [b] uniform in [0, 1); unused at temperature 0.
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    cumulative = sampling_logits(logits, config).double().softmax(-1).cumsum(-1)
    targets = draws.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
