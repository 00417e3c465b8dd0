"""The keys of ``evaluate``."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_kd.evaluation.harness import HarnessConfig
from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.parallel.layout import ParallelConfig


@dataclass(frozen=True)
class HeldoutDataConfig:
    """The ``data.*`` keys of evaluation."""

    path: str | None = None
    """A held-out chunk dataset; None skips the held-out loss."""


@dataclass(frozen=True)
class ExposureConfig:
    """The ``exposure.*`` keys of evaluation."""

    num_texts: int = 256
    prompt_length: int = 64
    response_length: int = 64
    """l of ExAccErr(l) (evaluation/exposure_bias.py)."""
    seed: int = 10

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        for name in ("num_texts", "prompt_length", "response_length"):
            if getattr(self, name) < 1:
                yield f"'exposure.{name}' must be at least 1, not {getattr(self, name)}"


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that ``evaluate`` reads."""

    model: ScoredModelConfig
    data: HeldoutDataConfig = field(default_factory=HeldoutDataConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 8
    calibration: bool = False
    """Also measure the expected calibration error of next-token predictions, in a second pass."""
    teacher: str | None = None
    """A checkpoint: also measure the exposure bias against it, on text that both models generate (``exposure.*``)."""
    exposure: ExposureConfig = field(default_factory=ExposureConfig)
    output: str | None = None
    """A JSON file for the figures, which are always printed."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values together."""
        if self.teacher is not None:
            yield from self.parallel.context_parallel_faults("the exposure bias generates text token by token")
        if self.micro_batch_size < 1:
            yield f"'micro_batch_size' must be at least 1, not {self.micro_batch_size}"
        if self.data.path is None and not self.harness.tasks:
            yield "'data.path' (a held-out dataset) or 'harness.tasks' is required"
        if self.data.path is None and (self.calibration or self.teacher):
            yield "'calibration' and 'teacher' need held-out text: 'data.path' is required"
