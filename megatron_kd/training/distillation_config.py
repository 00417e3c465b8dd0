"""The ``distillation.*`` keys. Importing this loads no torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Iterator, Literal, Mapping

from megatron_kd.errors import ConfigError
from megatron_kd.generation.sampling import SamplingConfig
from megatron_kd.losses.divergence_table import parse_divergence
from megatron_kd.training.methods.method_config import DistiLLMConfig, GKDConfig, MiniLLMConfig

LossReduction = Literal["token", "sequence"]
METHODS_WITH_TEXT = ("gkd", "distillm", "minillm")
METHOD_DEFAULTS = {"vanilla_kd": (0.5, "forward_kl"), "gkd": (1.0, "jsd"), "distillm": (1.0, "skew_reverse_kl")}


@dataclass(frozen=True)
class LossConfig:
    """``distillation.loss``: how the fused loss runs, in training and between its steps; changes memory and speed,
    never the value."""

    RENAMED: ClassVar[Mapping[str, str]] = {"chunk_megabytes": "tile_megabytes"}
    backend: Literal["auto", "torch", "triton"] = "auto"
    """auto is triton on CUDA once a recorded run has verified its kernels there (docs/losses.md), else torch."""
    tile_megabytes: int | None = None
    """Budget for the logits of a tile of tokens, of both models, and their temporaries; None is 896 on CUDA and 1280
    on a CPU. Fewer megabytes, more tiles, each of which reads both output weights again."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.tile_megabytes is not None and self.tile_megabytes < 1:
            yield f"'distillation.loss.tile_megabytes' must be at least 1, not {self.tile_megabytes}"

    @property
    def tile_bytes(self) -> int | None:
        """The budget in bytes; None for the default of the device."""
        return None if self.tile_megabytes is None else self.tile_megabytes << 20


@dataclass(frozen=True)
class RolloutConfig:
    """``distillation.rollout``: what is generated during training."""

    prompt_length: int = 768
    """First ids of a chunk; a shorter chunk is its own prompt. A dataset with prompts of its own gives those."""
    response_length: int | None = None
    """None means up to ``data.seq_length``."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Its temperature is apart from the loss's ``distillation.temperature``."""
    rows: int = 64
    """The most sequences that a rank decodes at a time; changes memory and speed, never the text."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        for name in ("prompt_length", "response_length", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"'distillation.rollout.{name}' must be at least 1, not {value}"


@dataclass(frozen=True)
class DistillationConfig:
    """The ``distillation.*`` keys."""

    RENAMED: ClassVar[Mapping[str, str]] = {"text": "rollout"}
    method: Literal["none", "vanilla_kd", "gkd", "distillm", "minillm"] = "none"
    kd_ratio: float | None = None
    """loss = (1 - kd_ratio) · LM + kd_ratio · divergence. None means 0.5 for Vanilla KD and 1 for GKD and DistiLLM; in
    MiniLLM it is that of the pre-training loss, and None means 0: LM alone."""
    divergence: str | None = None
    """forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd, or a weighted mixture of them such as
    0.9*forward_kl+0.1*reverse_kl. None means the method's: forward_kl for Vanilla KD, jsd for GKD, skew_reverse_kl for
    DistiLLM."""
    beta: float = 0.5
    """Weight of the teacher in JSD's mixture. GKD takes 0 and 1 for forward_kl and reverse_kl."""
    skew_alpha: float = 0.1
    """Weight of the other distribution in the skewed divergences' mixture."""
    temperature: float = 1.0
    """Of the divergence, on both sides; the LM term is at 1."""
    temperature_squared: bool = False
    """Multiply the divergence by temperature²: its gradient then keeps its size as the temperature grows."""
    sparse_target: Literal["auto", "ghost", "renormalised", "sampled", "weighted"] = "auto"
    """The loss against knowledge of a few ids a token; auto is ghost for the largest, sampled or weighted for draws."""
    pretraining_weight: float = 0.0
    """Of the pre-training loss on the dataset's batches, beside the batches of generated text."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    gkd: GKDConfig = field(default_factory=GKDConfig)
    distillm: DistiLLMConfig = field(default_factory=DistiLLMConfig)
    minillm: MiniLLMConfig = field(default_factory=MiniLLMConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.kd_ratio is not None and not 0 <= self.kd_ratio <= 1:
            yield f"'distillation.kd_ratio' must be between 0 and 1, not {self.kd_ratio}"
        if self.temperature <= 0:
            yield f"'distillation.temperature' must be above 0, not {self.temperature}"
        if not 0 <= self.beta <= 1 or (self.beta in (0, 1) and self.method != "gkd"):
            yield f"'distillation.beta' must be between 0 and 1 (both excluded except in gkd), not {self.beta}"
        if not 0 <= self.skew_alpha < 1:
            yield f"'distillation.skew_alpha' must be in [0, 1), not {self.skew_alpha}"
        if self.divergence is not None:
            try:
                parse_divergence(self.divergence)
            except ConfigError as error:
                yield f"'distillation.divergence': {error}"
        if self.pretraining_weight < 0:
            yield f"'distillation.pretraining_weight' must not be negative, not {self.pretraining_weight}"
        if self.pretraining_weight > 0 and self.method not in METHODS_WITH_TEXT:
            yield "'distillation.pretraining_weight' is for methods that train on generated text"
        if self.method == "minillm" and not self.rollout.sampling.is_plain:
            yield "'distillation.rollout.sampling' must be plain in minillm, whose weights are the models' own ratios"
        if self.method == "minillm" and self.pretraining_weight == 0 and self._differs_from_defaults_of_the_loss:
            yield (
                "'distillation.kd_ratio', 'divergence' and 'temperature' are those of minillm's pre-training loss: set "
                "'distillation.pretraining_weight' too, or leave them out"
            )

    @property
    def _differs_from_defaults_of_the_loss(self) -> bool:
        return self.kd_ratio is not None or self.divergence is not None or self.temperature != 1.0

    @property
    def mixes_two_terms(self) -> bool:
        """Whether every batch's loss is (1 - kd_ratio) · LM + kd_ratio · divergence, neither with weight 0."""
        ratio = METHOD_DEFAULTS.get(self.method, (0.0, ""))[0] if self.kd_ratio is None else self.kd_ratio
        return self.method in METHOD_DEFAULTS and 0 < ratio < 1 and self.pretraining_weight == 0

    @property
    def decodes_with_teacher(self) -> bool:
        """Whether the teacher generates token by token."""
        return (self.method == "gkd" and self.gkd.seq_kd) or (self.method == "minillm" and self.minillm.teacher_mix > 0)
