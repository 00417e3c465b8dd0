"""What the training loop tells a teacher at its start and after every batch, so that one on other ranks keeps in step.

For one batch: SAVE where a checkpoint follows (collective over the world), then one of CONTINUE, REWIND and STOP.
``position`` is the global batch, counted from 0, with which the student goes on. Batches are passed over but never read
again, so within one process it only grows: a teacher that reads ahead is always ahead of the right batch.
"""

import enum
from dataclasses import dataclass


class Action(str, enum.Enum):
    """What follows."""

    CONTINUE = "continue"
    SAVE = "save"
    """Every rank of the world takes part in writing a checkpoint: ``training.checkpoint.take_part_in_save``."""
    REWIND = "rewind"
    """Every rank of the world takes part in loading one: ``training.checkpoint.take_part_in_load``."""
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    """What every rank does next, and the global batch that follows."""

    action: Action
    position: int
    step: int
    """Optimizer steps done so far, which names a checkpoint."""
