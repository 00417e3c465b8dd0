"""The keys of ``evaluate``. Importing them loads no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.parallel.layout import ParallelConfig

PAPER_TASKS = (
    "hellaswag",
    "lambada_openai",
    "winogrande",
    "openbookqa",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "social_iqa",
    "storycloze_2018",
)
"""The zero-shot tasks of the MiniPLM paper (arXiv 2410.17215)."""


@dataclass(frozen=True)
class HeldoutDataConfig:
    """The ``data.*`` keys of evaluation."""

    path: str | None = None
    """A held-out chunk dataset; None skips the held-out loss."""


@dataclass(frozen=True)
class HarnessConfig:
    """The ``harness.*`` keys of ``evaluate``."""

    tasks: tuple[str, ...] = ()
    """Names of tasks; ``paper`` stands for the paper's nine."""
    include_path: str | None = None
    """A folder with your own task files."""
    num_fewshot: int = 0
    batch_size: int = 64
    limit: int | None = None
    """Documents per task; None for all."""
    dtype: str | None = None
    """Data type of the model; None for float16 on CUDA, as in the paper, and float32 on a CPU."""
    add_bos_token: bool | None = None
    """Whether every text begins with bos; None follows the paper: for Llama and Mistral only."""
    bootstrap_iters: int = 100_000

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.num_fewshot < 0 or self.batch_size < 1:
            yield "'harness.num_fewshot' must not be negative and 'harness.batch_size' at least 1"

    @property
    def task_names(self) -> tuple[str, ...]:
        """Every task once, with ``paper`` expanded."""
        return tuple(
            dict.fromkeys(name for task in self.tasks for name in (PAPER_TASKS if task == "paper" else (task,)))
        )


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
