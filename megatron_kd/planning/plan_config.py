"""What ``plan_run`` reads: the ``plan.*`` keys, and the part of a training configuration that a plan depends on.

Nothing here imports torch: a plan is wanted before anything is installed, and at once.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Iterator, Literal, Mapping

from megatron_kd.costs.gpus import PlanConfig
from megatron_kd.models.architecture import ARCHITECTURES
from megatron_kd.parallel.layout import ParallelConfig
from megatron_kd.teachers.teacher_config import TeacherConfig
from megatron_kd.training.methods.method_table import METHODS


@dataclass(frozen=True)
class PlannedModel:
    """``model.*`` of the run."""

    READS_A_PART: ClassVar[bool] = True
    name: str

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.name not in ARCHITECTURES:
            yield f"'model.name' is '{self.name}', not one of {', '.join(ARCHITECTURES)}"


@dataclass(frozen=True)
class PlannedData:
    """``data.*`` of the run."""

    READS_A_PART: ClassVar[bool] = True
    seq_length: int | None = None


@dataclass(frozen=True)
class PlannedTraining:
    """``training.*`` of the run."""

    READS_A_PART: ClassVar[bool] = True
    train_iters: int = 1000
    global_batch_size: int = 8
    micro_batch_size: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class PlannedLoss:
    """``distillation.loss.*`` of the run."""

    READS_A_PART: ClassVar[bool] = True
    RENAMED: ClassVar[Mapping[str, str]] = {"chunk_megabytes": "tile_megabytes"}
    tile_megabytes: int | None = None

    @property
    def tile_bytes(self) -> int | None:
        """The budget in bytes; None for the default of a GPU."""
        return None if self.tile_megabytes is None else self.tile_megabytes << 20

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.tile_megabytes is not None and self.tile_megabytes < 1:
            yield f"'distillation.loss.tile_megabytes' must be at least 1, not {self.tile_megabytes}"


@dataclass(frozen=True)
class PlannedDistillation:
    """``distillation.*`` of the run."""

    READS_A_PART: ClassVar[bool] = True
    method: str = "none"
    loss: PlannedLoss = field(default_factory=PlannedLoss)

    def validate(self) -> Iterator[str]:
        """Yield one message per invalid value."""
        if self.method not in METHODS:
            yield f"'distillation.method' must be one of {', '.join(METHODS)}, not {self.method!r}"


@dataclass(frozen=True)
class PlannedTeacher(TeacherConfig):
    """``teacher.*`` of the run; what the teacher is read from need not exist yet."""

    READS_A_PART: ClassVar[bool] = True

    def validate(self) -> Iterator[str]:
        """Yield one message per invalid value."""
        yield from self.placement_faults(but=(self.where.source,))


@dataclass(frozen=True)
class PlanRunConfig:
    """A training configuration as ``plan_run`` sees it; keys that only training reads are passed over."""

    READS_A_PART: ClassVar[bool] = True
    model: PlannedModel
    data: PlannedData = field(default_factory=PlannedData)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: PlannedTraining = field(default_factory=PlannedTraining)
    distillation: PlannedDistillation = field(default_factory=PlannedDistillation)
    teacher: PlannedTeacher = field(default_factory=PlannedTeacher)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def validate(self) -> Iterator[str]:
        """Faults in the values together, one message each."""
        if self.teacher.placement != "none" and self.plan.teacher is None:
            yield (
                f"'plan.teacher' (an architecture's name) is required, since teacher.placement is "
                f"{self.teacher.placement}"
            )
