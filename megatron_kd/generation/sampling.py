"""The keys of how the next token is drawn: temperature, top-k, top-p. Importing this loads no torch."""

from dataclasses import dataclass
from typing import Iterator


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """0 keeps all ids."""
    top_p: float = 1.0

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
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
