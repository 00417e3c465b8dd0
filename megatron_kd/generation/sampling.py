"""From next-token logits to the next token: temperature, top-k, top-p, and inversion of the cumulative distribution.

One uniform number a token, ids in ascending order: the token is the first whose cumulative probability exceeds the
number. Shapes: b sequences, v ids. No collectives.
"""

from dataclasses import dataclass
from typing import Iterator


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
