"""Folders and files that appear whole or not at all.

:func:`building` yields ``<output>.tmp-<pid>-<random>`` and renames it to ``<output>`` when its block ends without an
error, after flushing everything in it to the disk. On an error the folder is removed. A writer that was killed leaves
its temporary folder behind, which never has the output's name; the next writer of the same output removes it (a lock
file tells a dead writer from a live one).
"""

import contextlib
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_kd.artefacts.checksums import as_bytes
from megatron_kd.artefacts.folder_lock import LOCK_NAME, try_lock
from megatron_kd.errors import DataError

_STARTING_SECONDS = 60


@contextlib.contextmanager
def building(output: str | Path) -> Iterator[Path]:
    """Yield a folder to build in, and rename it to ``output`` at the end of the block.

    Raises:
        DataError: ``output`` exists (checked at both ends), or its parent cannot be written.
    """
    output = Path(output)
    refuse_existing(output)
    temporary = output.parent / f"{output.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(output)
        temporary.mkdir()
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise DataError(f"{output}: cannot create the output folder ({error.strerror})") from None
    try:
        with name_failed_writes(output):
            lock = try_lock(temporary / LOCK_NAME)
            if lock is None:  # another writer of this output takes the folder for abandoned
                raise DataError(f"{output}: another process is starting to write it; run again when it has ended")
            with lock:
                yield temporary
                refuse_existing(output)
                _flush_tree(temporary)
                (temporary / LOCK_NAME).unlink()
                os.rename(temporary, output)
            fsync_folder(output.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def name_failed_writes(path: Path) -> Iterator[None]:
    """Give an OSError of the block that names no file, as that of a failed write, this path."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def refuse_existing(output: Path) -> None:
    """Refuse to overwrite anything.

    Raises:
        DataError: ``output`` exists.
    """
    if output.exists() or output.is_symlink():
        raise DataError(f"{output}: already exists and is not this same artefact; remove it or choose another output")


def remove_abandoned(output: Path) -> None:
    """Remove the temporary folders that killed writers of ``output`` left behind."""
    for folder in output.parent.glob(f"{glob.escape(output.name)}.tmp-*"):
        lock_path = folder / LOCK_NAME
        try:
            lock = try_lock(lock_path, "r+")
            if lock is not None:
                with lock:
                    shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # killed at its very start or end; or a live one's that has just started or is done
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _STARTING_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a small file whole or not at all: temporary name, flush to the disk, rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with name_failed_writes(path), open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an array as ``np.save`` does, but with an error that says why when the disk is full.

    Raises:
        OSError: with ``errno``, which that of ``np.save`` lacks after a short write.
    """
    values = np.ascontiguousarray(values)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(as_bytes(values))


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_flush(descriptor: int, start: int, length: int) -> None:
    """Let the disk start writing bytes of an open file, without waiting: the flush at its end has little left."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    fsync_folder(folder)
