"""The keys of ``score_corpus``; read without torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.parallel.layout import ParallelConfig


@dataclass(frozen=True)
class ScoredDataConfig:
    """The ``data.*`` keys of scoring."""

    path: str
    """The chunk dataset to score."""


@dataclass(frozen=True)
class ScoreCorpusConfig:
    """Everything that ``score_corpus`` reads."""

    data: ScoredDataConfig
    model: ScoredModelConfig
    output: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 16
    """Rows of ``seq_length`` positions per forward pass; shorter chunks make more rows, of as many positions."""
    chunks_per_unit: int | None = None
    """Chunks that are handed out and saved together; None for 128 micro-batches, fewer for small datasets."""
    force: bool = False
    """Score a reference split even with the model that was trained on it."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.micro_batch_size < 1:
            yield f"'micro_batch_size' must be at least 1, not {self.micro_batch_size}"
        if self.chunks_per_unit is not None and self.chunks_per_unit < 1:
            yield f"'chunks_per_unit' must be at least 1, not {self.chunks_per_unit}"
        yield from self.parallel.context_parallel_faults("chunks are scored whole")
