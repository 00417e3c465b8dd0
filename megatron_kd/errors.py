"""The errors that a user can cause, each carried to the shell as one line and exit status 2.

Anything else that is raised is a fault of this project and shows its traceback.
"""

import errno

EXIT_BAD_INPUT = 2
EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: the same command, started again, goes on."""


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and what to do about it, on one line.

    ``is_reported`` is True where another rank of the same world prints it.
    """

    exit_status = EXIT_BAD_INPUT
    is_reported: bool | None = None


class ConfigError(UserError):
    """A configuration that cannot be used: unknown keys, wrong types, values that exclude each other."""


class DataError(UserError):
    """A corpus, dataset, score file or cache that is missing, malformed or does not match its user."""


class CheckpointError(UserError):
    """A checkpoint or Hugging Face folder that is missing, damaged or of another model."""


class LayoutError(ConfigError):
    """A parallel layout that does not divide the world, the heads, the layers or the batch."""


class NonFiniteLossError(UserError):
    """A loss or gradient norm that is not finite: training stopped before the optimizer step."""


class DiskFullError(UserError):
    """A file could not be written because the disk is full, or because it may not grow."""


def disk_full(error: OSError) -> DiskFullError | None:
    """What to tell the user where ``error`` says that the disk is full; None where it is another fault."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return DiskFullError(f"the disk is full while writing {error.filename or 'the output'}: free space and run again")


class Preempted(UserError):
    """The run was told to stop, and did so with a checkpoint: the same command goes on from it."""

    exit_status = EXIT_REQUEUE
