"""The interface between the training loop and a teacher, which takes token ids and gives knowledge about them.

    follow(decision)        what comes next: before the first batch and after each one
    begin_step(batches)     before the student's schedule
    knowledge(batch)        inside it, on the last pipeline stage

Every placement has this interface, so the loop cannot tell them apart. A teacher is never wrapped in DDP, never in the
optimizer and never in the student's checkpoint.

After every batch the loop says what follows: SAVE where a checkpoint does, then one of CONTINUE, REWIND and STOP.
Checkpoints are written and read by the student's ranks alone; a teacher on other ranks takes no part in them.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.errors import DataError, LayoutError
from megatron_kd.generation.decoder import Decoder
from megatron_kd.losses.types import DenseKnowledge, SparseKnowledge


class Action(str, enum.Enum):
    """What the training loop does next."""

    CONTINUE = "continue"
    SAVE = "save"
    """Write a checkpoint."""
    REWIND = "rewind"
    """Load a checkpoint, then continue with the batches at ``position``."""
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    """What every rank does next."""

    action: Action
    position: int
    """The global batch, counted from 0, that follows. Batches are skipped but never read again, so within one process
    it only grows: what a teacher has read ahead is never wrong."""
    step: int
    """Optimizer steps done so far, which names a checkpoint."""


class Teacher(Protocol):
    """A teacher, as the training loop sees it. Placements derive from it and so inherit what they do not support."""

    def follow(self, decision: Decision) -> None:
        """Learn what the training loop does next: once before the first batch, then after each.

        Collective over the student's ranks. After STOP nothing is asked any more. Not needed by a teacher that does
        not run ahead.
        """

    def decoder(self, groups: ProcessGroupCollection, rows: int, length: int, vocab_size: int) -> Decoder:
        """Return a decoder with which the teacher generates text on the student's ranks.

        Args:
            groups: the student's.
            rows, length, vocab_size: see :class:`~megatron_kd.generation.decoder.Decoder`.

        Raises:
            LayoutError: the teacher is not on the student's ranks, or its layout is not the student's.
        """
        raise LayoutError(
            "generating with the teacher needs teacher.placement=colocated: its ranks must hold the student too"
        )

    def begin_step(self, batches: Sequence[Batch], *, scheduled: bool = True) -> None:
        """Announce this rank's micro-batches, in the order in which they will be asked for.

        Collective over the student's ranks, each with as many micro-batches.

        Args:
            scheduled: they are the next ones of the training data's schedule, so a teacher may have read ahead; False
                for any others (held-out or generated text).
        """

    def knowledge(self, batch: Batch) -> DenseKnowledge | SparseKnowledge | None:
        """Return the teacher's knowledge about ``batch``, the next of the announced ones (see :class:`Announced`).

        Knowledge is given on the student's last pipeline stage, under context parallelism about this rank's positions;
        None elsewhere. Each batch is asked for once, in the announced order, on all ranks of that stage.
        """


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


class ScheduledBatches(Protocol):
    """The batches of the training data's schedule, as the student's ranks read them."""

    micro_batches: int
    """Micro-batches per step of a data-parallel rank of the student."""

    def read(self, position: int, data_rank: int, micro_batch: int) -> Batch:
        """Read micro-batch ``micro_batch`` of the student's rank ``data_rank`` in the global batch at ``position``."""

    def root_ids(self, batch: Batch) -> Tensor:
        """Return the ids, int64 [b], that the batch's chunks have in the root of their dataset."""


class TeacherRanks(Protocol):
    """A teacher on ranks of its own, as each of them runs it."""

    def run(self) -> None:
        """Serve the student until it stops."""
