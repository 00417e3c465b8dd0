"""The keys of generation: how the next token is drawn, and those of ``generate_corpus``. Read without torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.parallel.layout import ParallelConfig


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


@dataclass(frozen=True)
class PromptDataConfig:
    """The ``data.*`` keys of generation."""

    path: str
    """A chunk dataset, which gives the prompts and the tokenizer."""


@dataclass(frozen=True)
class GenerateCorpusConfig:
    """Everything that ``generate_corpus`` reads."""

    data: PromptDataConfig
    model: ScoredModelConfig
    output: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    prompt: Literal["chunk", "begin"] = "chunk"
    """``chunk``: prompts from the dataset. ``begin``: every text starts from one id alone, the model's BOS, or the
    end-of-document id if it has none."""
    prompt_length: int = 768
    """First ids of a chunk; a shorter chunk is its own prompt. A dataset with prompts of its own gives those."""
    response_length: int = 256
    """The most ids that the model adds."""
    num_texts: int | None = None
    """None means one for every chunk; needed with ``prompt: begin``."""
    stop_at_eos: bool = True
    """False continues with another document after the end of one, up to the length."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 10
    micro_batch_size: int = 16

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        yield from self.parallel.context_parallel_faults("text is generated token by token")
        for name in ("prompt_length", "response_length", "micro_batch_size", "num_texts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"'{name}' must be at least 1, not {value}"
        if self.prompt == "begin" and self.num_texts is None:
            yield "'prompt' begin needs 'num_texts', the number of texts"
