"""One writer of a folder at a time: a lock file in it, which the system frees when its owner ends, however it ends.

Whoever comes second is told so at once; nobody waits. Between machines it holds as far as the file system's flock does.
"""

import fcntl
from pathlib import Path
from typing import IO

from megatron_kd.errors import DataError

LOCK_NAME = ".writer.lock"


def try_lock(path: Path, mode: str = "w", shared: bool = False) -> IO[str] | None:
    """The file at ``path``, open and locked until it is closed; None where another has locked it.

    Args:
        mode: ``w`` makes the file, ``r+`` opens one that is there.
        shared: whether others that ask for the same may hold it too.

    Raises:
        OSError: the file cannot be opened.
    """
    file = open(path, mode, encoding="utf-8")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def free(file: IO[str]) -> None:
    """End a lock and close its file, which a forked child may hold open for longer."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def lock_folder(folder: Path, what: str, shared: bool = False) -> IO[str]:
    """Make ``folder`` where there is none, and lock it.

    Args:
        what: what is written there, for the message: ``these scores``.

    Raises:
        DataError: there can be no such folder; somebody else is writing there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = try_lock(folder / LOCK_NAME, shared=shared)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise DataError(f"{folder}: cannot create it ({error.strerror})") from None
    if file is None:
        raise DataError(f"{folder}: another run is writing {what}; wait for it or end it")
    return file
