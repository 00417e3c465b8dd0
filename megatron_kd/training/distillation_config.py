"""The ``distillation.*`` keys. Importing this loads no torch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Iterator, Literal, Mapping, TypeVar

from megatron_kd.errors import ConfigError
from megatron_kd.generation.generation_config import SamplingConfig
from megatron_kd.losses.divergence_table import parse_divergence
from megatron_kd.training.methods.method_table import METHODS

ClassT = TypeVar("ClassT")


@dataclass(frozen=True)
class LossConfig:
    """The ``distillation.loss.*`` keys: how the fused loss runs. They change memory and speed, never the value."""

    RENAMED: ClassVar[Mapping[str, str]] = {"chunk_megabytes": "tile_megabytes"}
    backend: Literal["auto", "torch", "triton"] = "auto"
    """auto is triton on CUDA once a recorded run has verified its kernels there (docs/losses.md), else torch."""
    tile_megabytes: int | None = None
    """Budget for the logits of a tile of tokens, of both models, and their temporaries; None is 896 on CUDA and 1280
    on a CPU. Fewer megabytes, more tiles, each of which reads both output weights again."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.tile_megabytes is not None and self.tile_megabytes < 1:
            yield f"'distillation.loss.tile_megabytes' must be at least 1, not {self.tile_megabytes}"

    @property
    def tile_bytes(self) -> int | None:
        """The budget in bytes; None for the default of the device."""
        return None if self.tile_megabytes is None else self.tile_megabytes << 20


@dataclass(frozen=True)
class RolloutConfig:
    """The ``distillation.rollout.*`` keys: the text that is generated during training."""

    prompt_length: int = 768
    """First ids of a chunk; a shorter chunk is its own prompt. A dataset with prompts of its own gives those."""
    response_length: int | None = None
    """None means up to ``data.seq_length``."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Its temperature only samples; ``distillation.temperature`` is the loss's."""
    rows: int = 64
    """The most sequences that a rank decodes at a time; changes memory and speed, never the text."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        for name in ("prompt_length", "response_length", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"'distillation.rollout.{name}' must be at least 1, not {value}"


def with_method_sections(cls: type[ClassT]) -> type[ClassT]:
    """Declare a field for the settings of every method that has some, and the choices of ``method``."""
    cls.__annotations__["method"] = Literal[tuple(METHODS)]
    for method in METHODS.values():
        if method.settings is not None:
            cls.__annotations__[method.name] = method.settings
            setattr(cls, method.name, field(default_factory=method.settings))
    return cls


@dataclass(frozen=True)
@with_method_sections
class DistillationConfig:
    """The ``distillation.*`` keys. Each method's own are ``distillation.<method>.*``, see :data:`METHODS`."""

    RENAMED: ClassVar[Mapping[str, str]] = {"text": "rollout"}
    method: str = "none"
    kd_ratio: float | None = None
    """loss = (1 - kd_ratio) · LM + kd_ratio · divergence. None means the method's: 0.5 for Vanilla KD, 1 for GKD and
    DistiLLM; in MiniLLM it describes the pre-training loss, and None means 0: LM alone."""
    divergence: str | None = None
    """forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd, or a weighted mixture of them such as
    0.9*forward_kl+0.1*reverse_kl. None means the method's: forward_kl for Vanilla KD, jsd for GKD, skew_reverse_kl for
    DistiLLM."""
    beta: float = 0.5
    """Weight of the teacher in JSD's mixture. GKD takes 0 and 1 for forward_kl and reverse_kl."""
    skew_alpha: float = 0.1
    """Weight of the other distribution in the skewed divergences' mixture."""
    temperature: float = 1.0
    """Temperature of both distributions in the divergence; the LM term is at 1."""
    temperature_squared: bool = False
    """Multiply the divergence by temperature²: its gradient then keeps its size as the temperature grows."""
    sparse_target: Literal["auto", "ghost", "renormalised", "sampled", "weighted"] = "auto"
    """The loss against a few ids per token; auto is ghost for the most probable ids, sampled or weighted for draws."""
    pretraining_weight: float = 0.0
    """Weight of the pre-training loss on the dataset's batches, beside the batches of generated text."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    @property
    def settings(self) -> Any:
        """The section of the method in use; None for a method without keys of its own."""
        return getattr(self, self.method, None)

    @property
    def resolved_kd_ratio(self) -> float:
        """``kd_ratio``, or the method's default."""
        return METHODS[self.method].kd_ratio if self.kd_ratio is None else self.kd_ratio

    @property
    def resolved_divergence(self) -> str:
        """``divergence``, or the method's default."""
        return self.divergence or METHODS[self.method].divergence

    @property
    def mixes_two_terms(self) -> bool:
        """Whether every batch's loss is (1 - kd_ratio) · LM + kd_ratio · divergence, neither with weight 0."""
        method = METHODS[self.method]
        describes_the_loss = method.needs_teacher and method.objective == "main" and self.pretraining_weight == 0
        return describes_the_loss and 0 < self.resolved_kd_ratio < 1

    @property
    def pretraining_uses_teacher(self) -> bool:
        """Whether the pre-training loss beside generated text has a distillation term."""
        describes_pretraining = METHODS[self.method].objective == "pretraining"
        return describes_pretraining and self.pretraining_weight > 0 and self.resolved_kd_ratio > 0

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        method = METHODS[self.method]
        if self.kd_ratio is not None and not 0 <= self.kd_ratio <= 1:
            yield f"'distillation.kd_ratio' must be between 0 and 1, not {self.kd_ratio}"
        if self.temperature <= 0:
            yield f"'distillation.temperature' must be above 0, not {self.temperature}"
        if not 0 <= self.beta <= 1 or (self.beta in (0, 1) and not method.allows_beta_0_and_1):
            yield f"'distillation.beta' must be between 0 and 1 (both excluded except in gkd), not {self.beta}"
        if not 0 <= self.skew_alpha < 1:
            yield f"'distillation.skew_alpha' must be in [0, 1), not {self.skew_alpha}"
        if self.divergence is not None:
            yield from _divergence_faults(self.divergence)
        if self.pretraining_weight < 0:
            yield f"'distillation.pretraining_weight' must not be negative, not {self.pretraining_weight}"
        if self.pretraining_weight > 0 and not method.generates_text:
            yield "'distillation.pretraining_weight' is for methods that train on generated text"
        if method.needs_plain_sampling and not self.rollout.sampling.is_plain:
            yield (
                f"'distillation.rollout.sampling' must be plain in {self.method}, which weighs by the models' own "
                "probabilities"
            )
        if method.objective == "pretraining" and self.pretraining_weight == 0 and self._describes_a_loss:
            yield (
                f"'distillation.kd_ratio', 'divergence' and 'temperature' describe {self.method}'s pre-training loss: "
                "set 'distillation.pretraining_weight' too, or leave them out"
            )

    @property
    def _describes_a_loss(self) -> bool:
        return self.kd_ratio is not None or self.divergence is not None or self.temperature != 1.0


def _divergence_faults(name: str) -> Iterator[str]:
    try:
        parse_divergence(name)
    except ConfigError as error:
        yield f"'distillation.divergence': {error}"
