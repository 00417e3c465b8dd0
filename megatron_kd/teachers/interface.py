"""What the training loop knows of a teacher: it takes token ids and gives knowledge about them.

A teacher is never wrapped in DDP, never in the optimizer and never in the student's checkpoint. Every placement gives
the same interface, so the loop cannot tell them apart:

    follow(decision)        what comes next: before the first batch and after each one
    begin_step(batches)     before the student's schedule
    knowledge(batch)        inside it, on the last pipeline stage

What the training loop tells a teacher at its start and after every batch, so that one on other ranks keeps in step.

For one batch: SAVE where a checkpoint follows, then one of CONTINUE, REWIND and STOP. Checkpoints are written and read
by the student's ranks alone; a teacher on other ranks takes no part in them.
``position`` is the global batch, counted from 0, with which the student goes on. Batches are passed over but never read
again, so within one process it only grows: a teacher that reads ahead is always ahead of the right batch.
"""

import enum
from dataclasses import dataclass
from typing import Iterator, Literal, Protocol, Sequence

from megatron_kd.data.batch import Batch
from megatron_kd.errors import DataError
from megatron_kd.losses import DenseKnowledge, SparseKnowledge


class Action(str, enum.Enum):
    """What follows."""

    CONTINUE = "continue"
    SAVE = "save"
    """The student writes a checkpoint."""
    REWIND = "rewind"
    """The student goes back to a checkpoint, and on with the batches at ``position``."""
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    """What every rank does next, and the global batch that follows."""

    action: Action
    position: int
    step: int
    """Optimizer steps done so far, which names a checkpoint."""


Placement = Literal["none", "colocated", "remote", "cached"]
Payload = Literal["hidden", "top_k", "sampled"]


@dataclass(frozen=True)
class TeacherConfig:
    """The ``teacher.*`` keys."""

    placement: Placement = "none"
    path: str | None = None
    cache_path: str | None = None
    """What ``cache_teacher_logits`` wrote about ``data.path``, or about a dataset that it was selected from."""
    eval_cache_path: str | None = None
    """The same about ``data.eval_path``: then the distillation loss is evaluated too."""
    evaluate: bool = True
    """Evaluate the distillation loss on ``data.eval_path`` too."""
    tensor_model_parallel_size: int | None = None
    """None means as the student's; 1 for a remote teacher."""
    pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool | None = None
    """None means as the student's, where the teacher is tensor parallel."""
    stash_megabytes: int = 1024
    """Co-located: hidden states that are kept on a device at a time; more of them go to host memory."""
    num_ranks: int | None = None
    """Remote: how many of the world's ranks, the last ones, are the teacher's."""
    prefetch_depth: int = 2
    """Remote: micro-batches of a teacher's data-parallel rank that it may hold finished and not yet taken."""
    payload: Payload = "hidden"
    """Remote: what is sent. ``hidden`` states; or ``top_k`` or ``sampled`` ids and weights, so that the teacher's ranks
    compute its output layer."""
    top_k: int = 64
    """Ids a token of the payload ``top_k``."""
    num_draws: int = 50
    """Draws a token of the payload ``sampled``."""

    @property
    def own_ranks(self) -> int:
        """How many ranks are the teacher's alone."""
        return (self.num_ranks or 0) if self.placement == "remote" else 0

    @property
    def payload_ids(self) -> int | None:
        """Ids a token that a remote teacher sends; None where it sends hidden states."""
        return {"hidden": None, "top_k": self.top_k, "sampled": self.num_draws}[self.payload]

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.placement in ("colocated", "remote") and self.path is None:
            yield f"'teacher.placement' is {self.placement}, so 'teacher.path' (a checkpoint) is required"
        if self.placement == "cached" and self.cache_path is None:
            yield "'teacher.placement' is cached, so 'teacher.cache_path' (from cache_teacher_logits) is required"
        if self.placement == "remote" and self.num_ranks is None:
            yield "'teacher.placement' is remote, so 'teacher.num_ranks' (how many of the ranks are its) is required"
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "stash_megabytes", "num_ranks",
                     "prefetch_depth", "top_k", "num_draws"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"'teacher.{name}' must be at least 1, not {value}"
        if self.payload != "hidden" and self.placement in ("none", "colocated"):
            yield f"'teacher.payload' {self.payload} is for a remote teacher, not a {self.placement} one"

    @property
    def gives_sparse_knowledge(self) -> bool:
        """Whether it says a few ids a token, and the probability outside of them."""
        return self.placement == "cached" or self.payload != "hidden"

    @property
    def runs_a_model(self) -> bool:
        """Whether the teacher's forward passes are part of the run."""
        return self.placement in ("colocated", "remote")


class Teacher(Protocol):
    """One interface for every placement; the training loop cannot tell them apart."""

    def begin_step(self, batches: Sequence[Batch], *, scheduled: bool = True) -> None:
        """Announce this rank's micro-batches, in the order in which they will be asked for. Collective over the
        student's ranks, each with as many micro-batches.

        Args:
            scheduled: they are the next ones of the training data's schedule, so that a teacher may have read ahead;
                False for any others (held-out or generated text).
        """

    def knowledge(self, batch: Batch) -> DenseKnowledge | SparseKnowledge | None:
        """Return the teacher's knowledge about ``batch``, the next of the announced ones (see :class:`Announced`).

        Knowledge is given on the student's last pipeline stage, under context parallelism about this rank's positions;
        None elsewhere. Each batch is asked for once, in the announced order, on all ranks of that stage.
        """

    def follow(self, decision: Decision) -> None:
        """Learn what the training loop does next (see control.py): once before the first batch, then after each.
        Collective over the student's ranks. After STOP nothing is asked any more."""


class Announced:
    """The micro-batches of a step, which are asked for in the order in which they were announced."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._keys = [batch.key for batch in batches]
        self._next = 0

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def is_exhausted(self) -> bool:
        """Whether all of them have been asked for."""
        return self._next == len(self._keys)

    def take(self, batch: Batch) -> int:
        """Return the number of the micro-batch that is asked for next, which must be ``batch``.

        Raises:
            DataError: it is another one.
        """
        number = self._next
        if self.is_exhausted or self._keys[number] != batch.key:
            expected = "none is left" if self.is_exhausted else f"micro-batch {number} has key {self._keys[number]:#x}"
            raise DataError(
                f"the teacher is asked about a micro-batch with key {batch.key:#x}, where {expected} of the "
                f"{len(self)} that were announced: ask for all of them once, in their order"
            )
        self._next += 1
        return number
