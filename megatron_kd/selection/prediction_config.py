"""The keys of ``predict_difference``; read without torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_kd.models.architecture import ScoredModelConfig


@dataclass(frozen=True)
class SubsetConfig:
    """The ``subset.*`` keys: a scored random part of the corpus, as ``split_dataset`` draws it."""

    path: str
    teacher_scores: str
    reference_scores: str
    force: bool = False
    """Accept a reference model that was trained on chunks of the subset."""


@dataclass(frozen=True)
class ProxyTrainingConfig:
    """The ``training.*`` keys: how the proxy is trained."""

    train_iters: int = 500
    batch_size: int = 32
    lr: float = 1e-4
    warmup_iters: int = 20
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    seed: int = 0

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        for key in ("train_iters", "batch_size", "lr", "clip_grad"):
            if getattr(self, key) <= 0:
                yield f"'training.{key}' must be above 0, not {getattr(self, key)}"


@dataclass(frozen=True)
class PredictedDataConfig:
    """The ``data.*`` keys of prediction."""

    path: str
    """The corpus that the subset was drawn from."""


@dataclass(frozen=True)
class PredictDifferenceConfig:
    """Everything that ``predict_difference`` reads."""

    data: PredictedDataConfig
    subset: SubsetConfig
    proxy: ScoredModelConfig
    """The model that the proxy starts from: a small trained one, for instance the reference model itself."""
    output: str
    training: ProxyTrainingConfig = field(default_factory=ProxyTrainingConfig)
    micro_batch_size: int = 16
    chunks_per_unit: int | None = None

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.micro_batch_size < 1:
            yield f"'micro_batch_size' must be at least 1, not {self.micro_batch_size}"
        if self.chunks_per_unit is not None and self.chunks_per_unit < 1:
            yield f"'chunks_per_unit' must be at least 1, not {self.chunks_per_unit}"
