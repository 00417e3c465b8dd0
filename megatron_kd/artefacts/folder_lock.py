"""One writer of a folder at a time: a lock file in it, which the system frees when its owner ends, however it ends.

Whoever comes second is told so at once; nobody waits. Between machines it holds as far as the file system's flock does.
"""

import fcntl
from pathlib import Path
from typing import IO

from megatron_kd.errors import DataError

LOCK_NAME = ".writer.lock"


def try_lock(path: Path, mode: str = "w", shared: bool = False) -> IO[str] | None:
    """Return the file at ``path``, open and locked until it is closed; None where another process has locked it.

    Args:
        mode: ``w`` creates the file, ``r+`` opens an existing one.
        shared: let others that ask for a shared lock hold it too.

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


def release(file: IO[str]) -> None:
    """End a lock and close its file, which a forked child may hold open for longer."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def lock_folder(folder: Path, shared: bool = False) -> IO[str]:
    """Create ``folder`` where there is none, and lock it.

    Args:
        shared: let others that ask for a shared lock hold it too.

    Raises:
        DataError: the folder cannot be created, or another process is writing into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = try_lock(folder / LOCK_NAME, shared=shared)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise DataError(f"{folder}: cannot create the folder ({error.strerror})") from None
    if file is None:
        raise DataError(f"{folder}: another run is writing into it; wait until it ends, or stop it")
    return file
