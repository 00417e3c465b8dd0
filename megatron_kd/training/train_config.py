"""Configuration of ``train``: the ``data.*``, ``training.*`` and ``optimizer.*`` keys, and the tree of all sections.

Importing this loads neither torch nor Megatron-Core, so a misspelt key is refused at once.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Iterator, Literal, Mapping

from megatron_kd.costs.gpus import PlanConfig
from megatron_kd.metrics.sinks import MetricsConfig
from megatron_kd.models.architecture import ModelConfig, Precision
from megatron_kd.parallel.layout import ParallelConfig
from megatron_kd.teachers.teacher_config import NO_TEACHER, TeacherConfig
from megatron_kd.training.distillation_config import DistillationConfig
from megatron_kd.training.fault_tolerance import FaultToleranceConfig
from megatron_kd.training.methods.method_table import METHODS, Method

LossReduction = Literal["token", "sequence"]


@dataclass(frozen=True)
class TrainingDataConfig:
    """The ``data.*`` keys of training."""

    path: str | tuple[str, ...]
    """One chunk dataset, or several to blend."""
    weights: tuple[float, ...] | None = None
    """Share of each of several datasets in the samples; None is in proportion to their chunks."""
    eval_path: str | None = None
    seq_length: int | None = None
    """None means the dataset's."""
    shuffle: bool = True
    mask_prompt: bool = False
    """Leave the predictions inside prompts out of the loss; the dataset then says where each chunk's prompt ends."""

    @property
    def is_blend(self) -> bool:
        """Whether ``open_data`` makes a blend of it."""
        return self.weights is not None or (not isinstance(self.path, str) and len(self.path) > 1)


@dataclass(frozen=True)
class TrainingConfig:
    """The ``training.*`` keys."""

    train_iters: int = 1000
    global_batch_size: int = 8
    micro_batch_size: int = 8
    seed: int = 10
    loss_reduction: LossReduction = "token"
    """``token``: mean over the unmasked tokens of the global batch. ``sequence``: the MiniPLM paper's, mean over its
    sequences of each one's mean."""
    precision: Precision = "fp32"
    eval_interval: int | None = None
    """None evaluates at the end only (where ``data.eval_path`` is given)."""
    save_interval: int | None = None
    """None saves at the end only."""
    keep_checkpoints: int | None = 2
    """How many of the newest checkpoints remain; None keeps all."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this remain for good."""
    async_save: bool = True
    """Copy and write checkpoints while training continues; the last one is waited for."""
    allow_other_data: bool = False
    """Resume from a checkpoint that was made with another dataset."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        for name in (
            "train_iters",
            "global_batch_size",
            "micro_batch_size",
            "eval_interval",
            "save_interval",
            "keep_checkpoints",
            "keep_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"'training.{name}' must be at least 1, not {value}"


@dataclass(frozen=True)
class OptimizerConfig:
    """The ``optimizer.*`` keys. Defaults are MiniPLM's (arXiv 2410.17215) except the rate."""

    lr: float = 1e-3
    min_lr: float | None = None
    """None means a tenth of ``lr``."""
    lr_warmup_iters: int = 0
    weight_decay: float = 0.01
    weight_decay_on_norms_and_biases: bool = True
    """MiniPLM decays every parameter; Megatron's custom is False."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-6
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.lr <= 0:
            yield f"'optimizer.lr' must be above 0, not {self.lr}"
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            yield f"'optimizer.min_lr' must be between 0 and optimizer.lr {self.lr}, not {self.min_lr}"
        for name in ("weight_decay", "clip_grad", "lr_warmup_iters"):
            if getattr(self, name) < 0:
                yield f"'optimizer.{name}' must not be negative, it is {getattr(self, name)}"
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"'optimizer.{name}' must be in [0, 1), not {getattr(self, name)}"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``train`` reads."""

    RENAMED: ClassVar[Mapping[str, str]] = {"survival": "fault_tolerance"}
    data: TrainingDataConfig
    output: str
    """The run folder."""
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    fault_tolerance: FaultToleranceConfig = field(default_factory=FaultToleranceConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Read by ``plan_run`` alone."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values taken together."""
        method, placement = METHODS[self.distillation.method], self.teacher.placement
        if method.generates_text:
            yield from self.parallel.context_parallel_faults(f"{method.name} generates text token by token")
        if method.needs_teacher and placement == NO_TEACHER:
            yield f"'distillation.method' {method.name} needs 'teacher.placement' (colocated) and its path"
        if not method.needs_teacher and placement != NO_TEACHER:
            yield f"'teacher.placement' is {placement}, but 'distillation.method' {method.name} uses no teacher"
        if not self.teacher.where.knows_any_text:
            yield from self._fixed_text_faults(method)
        if self.teacher.gives_sparse_knowledge and (self.teacher.where.knows_any_text or not method.generates_text):
            yield from self._sparse_faults(method)
        if method.needs_heldout_loss and self.data.eval_path is None:
            yield f"'distillation.method' {method.name} follows the held-out loss: set 'data.eval_path'"
        yield from method.faults(self)
        if self.metrics.kd_lm_gradient_ratio_interval is not None and not self.distillation.mixes_two_terms:
            yield (
                "'metrics.kd_lm_gradient_ratio_interval' needs a loss of an LM and a distillation term: a method such "
                "as vanilla_kd with 'distillation.kd_ratio' between 0 and 1, and no 'distillation.pretraining_weight'"
            )

    def _fixed_text_faults(self, method: Method) -> Iterator[str]:
        """Yield what a teacher that covers the chunks of one dataset alone cannot do."""
        if self.data.is_blend:
            yield (
                f"'data.path' blends datasets, but 'teacher.placement' {self.teacher.placement} covers one dataset: "
                "train on one, or use a colocated or remote teacher"
            )
        if method.generates_text:
            yield (
                f"'distillation.method' {method.name} generates text, which 'teacher.placement' "
                f"{self.teacher.placement} does not cover: use a colocated or remote teacher"
            )

    def _sparse_faults(self, method: Method) -> Iterator[str]:
        """Yield what a few ids of the teacher's distribution are not enough for."""
        divergence = self.distillation.resolved_divergence
        if not method.needs_whole_distribution and divergence == "forward_kl":
            return
        what = f"'distillation.method' {method.name}"
        if not method.needs_whole_distribution:
            what = f"'distillation.divergence' {divergence}"
        how = f"'teacher.payload' {self.teacher.payload} sends"
        if self.teacher.where.is_sparse:
            how = f"'teacher.placement' {self.teacher.placement} gives"
        yield (
            f"{what} needs the teacher's whole distribution, {how} a few ids of it: use forward_kl, or a colocated "
            "teacher, or payload hidden"
        )
