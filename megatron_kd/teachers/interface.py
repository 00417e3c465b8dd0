"""What the training loop knows of a teacher: it takes token ids and gives knowledge about them.

A teacher is never wrapped in DDP, never in the optimizer and never in the student's checkpoint.
"""

from dataclasses import dataclass
from typing import Iterator, Literal, Protocol, Sequence

from megatron_kd.data.batch import Batch
from megatron_kd.losses import DenseKnowledge
from megatron_kd.teachers.control import Decision


@dataclass(frozen=True)
class TeacherConfig:
    """The ``teacher.*`` keys."""

    placement: Literal["none", "colocated", "remote", "cached"] = "none"
    path: str | None = None
    cache_path: str | None = None
    tensor_model_parallel_size: int | None = None
    """None means as the student's."""
    pipeline_model_parallel_size: int | None = None

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.placement == "colocated" and self.path is None:
            yield "'teacher.placement' is colocated, so 'teacher.path' (a checkpoint) is required"
        if self.placement in ("remote", "cached"):
            yield f"'teacher.placement' {self.placement} is not available yet: use colocated"


class Teacher(Protocol):
    """One interface for every placement; the training loop cannot tell them apart."""

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Announce this rank's micro-batches of a step, in the order in which they will be asked for."""

    def knowledge(self, batch: Batch) -> DenseKnowledge | None:
        """The teacher's knowledge about ``batch``, on the student's last pipeline stage; None elsewhere."""

    def follow(self, decision: Decision) -> None:
        """Learn what the training loop does after a batch (see control.py); nothing to do where it runs here."""
