"""The lock that keeps two runs from writing one run folder."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Iterator

from megatron_kd.data.folder_lock import LOCK_NAME, free, try_lock
from megatron_kd.errors import ConfigError


class RunLock:
    """An exclusive lock on ``<run>/.writer.lock``; the system frees it when the process that took it ends."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / LOCK_NAME
        self._file: IO[str] | None = None
        self._made: list[Path] = []

    def take(self) -> None:
        """Make the folder where there is none, and lock it at once or not at all.

        Raises:
            ConfigError: another run holds it, or there can be no such folder.
        """
        refuse_what_is_no_folder(self._folder)
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        while self._file is None:
            with cannot_be_a_run_folder(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                file = try_lock(self._path)
            if file is None:
                raise ConfigError(
                    f"output {self._folder}: another run is training there; wait for it, end it or choose another "
                    "output"
                )
            if os.fstat(file.fileno()).st_nlink:
                self._file = file
            else:  # its owner ended, and removed it, between our two calls
                file.close()

    def release(self) -> None:
        """Remove the lock, and the folders that were made for it if they hold nothing else."""
        if self._file is None:
            return
        with suppress(OSError):
            self._path.unlink()
            for folder in self._made:
                folder.rmdir()
        free(self._file)
        self._file = None


def refuse_what_is_no_folder(folder: Path) -> None:
    """Raise :class:`ConfigError` where something else has the name of a run folder."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is not a folder: choose another run folder")


@contextmanager
def cannot_be_a_run_folder(folder: Path) -> Iterator[None]:
    """Turn what the system says while ``folder`` is made into a :class:`ConfigError`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"output {folder} cannot be a run folder: {error.strerror}") from None
