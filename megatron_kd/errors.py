"""Errors that a user can cause; the command line reports each as one line and exit status 2.

Any other exception is a bug of this project and shows its traceback.
"""

import errno

EXIT_BAD_INPUT = 2
EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: the run stopped early, and the same command resumes it."""


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong, where, and what to do.

    Attributes:
        exit_status: the process's exit status.
        is_reported: whether another rank of the same world prints the message; None where the ranks have not agreed.
    """

    exit_status = EXIT_BAD_INPUT
    is_reported: bool | None = None


class ConfigError(UserError):
    """An unusable configuration: unknown keys, wrong types, values that exclude each other."""


class DataError(UserError):
    """A corpus, dataset, score file or cache that is missing, malformed, or does not match what reads it."""


class CheckpointError(UserError):
    """A checkpoint or Hugging Face folder that is missing, damaged, or holds another model."""


class LayoutError(ConfigError):
    """A parallel layout that does not divide the world, the heads, the layers or the batch."""


class NonFiniteLossError(UserError):
    """A loss or gradient norm that is not finite; training stopped before the optimizer step."""


class DiskFullError(UserError):
    """A write that failed because the disk is full, or a quota or file-size limit was reached."""


class Preempted(UserError):
    """A run that was told to stop and left a checkpoint; the same command resumes it."""

    exit_status = EXIT_REQUEUE


def disk_full(error: OSError) -> DiskFullError | None:
    """Return the error to report if ``error`` means that the disk is full; None for any other fault."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return DiskFullError(f"the disk is full while writing {error.filename or 'the output'}: free space and run again")
