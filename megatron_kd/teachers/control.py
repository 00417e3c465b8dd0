"""What the training loop tells a teacher at its start and after every batch, so that one on other ranks keeps in step.

For one batch: SAVE where a checkpoint follows, then one of CONTINUE, REWIND and STOP. Checkpoints are written and read
by the student's ranks alone; a teacher on other ranks takes no part in them.
``position`` is the global batch, counted from 0, with which the student goes on. Batches are passed over but never read
again, so within one process it only grows: a teacher that reads ahead is always ahead of the right batch.
"""

import enum
from dataclasses import dataclass


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
