"""Unfinished work beside an output: what a killed run has done, so that the next one resumes there.

``<output>.partial/`` holds ``recipe.json`` (everything that decides the bytes of the work), a lock, and sealed records.
A record is a header of 64 bytes and a payload. The header has the digest of the recipe, the record's own name, its size
and a CRC-32 of all that: damage, records of another run and swapped files are found when a record is read.

    write(name, payload)      a part: a file of its own that appears whole or not at all
    new_part()                the same, written in pieces as they come
    append(name, payload)     many small records, one journal for each process and start

An artefact that grows in place keeps its files in the folder too, and for each of them a part that says how far it is
committed; :meth:`WorkStore.publish` gives the folder the output's name.

One run at a time claims the folder; tasks of one job may share it. All ranks of a claimed run may write.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from megatron_kd.artefacts.artefact_folder import fsync_folder, name_failed_writes, refuse_existing
from megatron_kd.artefacts.checksums import as_bytes
from megatron_kd.artefacts.folder_lock import LOCK_NAME, lock_folder, release
from megatron_kd.artefacts.manifest import recipe_of
from megatron_kd.errors import DataError

logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.json"
_HEADER = struct.Struct("<4sI16sQ32s")
_CHECKED_FROM = 8
"""First byte of the header that its checksum covers."""
_MAGIC = b"WRK1"
LONGEST_NAME = 32


class WorkStore:
    """The unfinished work of one output.

    Args:
        output: what the work will become; its folder is ``<output>.partial``.
        recipe: everything that decides the bytes of the work; JSON values.
    """

    def __init__(self, output: str | Path, recipe: Mapping[str, Any]) -> None:
        self.output = Path(output)
        self.folder = self.output.parent / f"{self.output.name}.partial"
        self.recipe: dict[str, Any] = json.loads(json.dumps(recipe))
        self._digest = bytes.fromhex(recipe_of(self.recipe))
        self._lock: IO[str] | None = None
        self._journal: BinaryIO | None = None

    def __enter__(self) -> "WorkStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self, shared: bool = False) -> None:
        """Create the folder, or take over what an earlier run of the same recipe left; hold it until :meth:`close`.

        Args:
            shared: let other runs of the same recipe hold it at the same time; for parts only, not for journals.

        Raises:
            DataError: it holds work of another recipe (names the differences), another run holds it, or it cannot be
                created.
        """
        self._lock = lock_folder(self.folder, shared)
        try:
            with name_failed_writes(self.folder):
                self._check_recipe()
                if not shared:
                    self._cut_journals()
        except BaseException:
            if shared or self._holds_work():
                self.close()
            else:
                self.remove()
            raise

    def close(self) -> None:
        """Close this process's journal and let another run have the folder."""
        self.end_journal()
        if self._lock is not None:
            release(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the claimed folder with everything in it: the output is whole, or nothing is worth keeping."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def remove_leftovers(self) -> None:
        """Remove the folder of a run of this recipe that was killed after its output was whole."""
        if self._written_recipe() != self.recipe:
            return
        with contextlib.suppress(DataError):  # a live run is about to remove it
            self.claim()
            self.remove()

    def publish(self) -> None:
        """Remove what is the store's own from the claimed folder, and give the folder the output's name.

        Raises:
            DataError: the output exists.
        """
        refuse_existing(self.output)
        fsync_folder(self.folder)
        own = [self.folder / RECIPE_NAME, *self._record_files(), *self.folder.glob("*.tmp-*"), self.folder / LOCK_NAME]
        for path in own:
            path.unlink(missing_ok=True)
        os.rename(self.folder, self.output)
        fsync_folder(self.output.parent)
        self.close()

    def path_of(self, name: str) -> Path:
        """Return the file of a part."""
        return _part_path(self.folder, name)

    def new_part(self) -> "PartFile":
        """Return a part to write in pieces."""
        return PartFile(self.folder, self._digest)

    def write(self, name: str, payload: bytes | np.ndarray) -> None:
        """Write a part, or replace one; it appears whole or not at all."""
        part = self.new_part()
        try:
            part.write(payload)
            part.finish(name)
        except BaseException:
            part.abort()
            raise

    def read(self, name: str) -> np.ndarray:
        """Return the payload of a part, uint8.

        Raises:
            DataError: it is missing, damaged, or not this part of this work.
        """
        path = self.path_of(name)
        try:
            return self._read(name)
        except FileNotFoundError:
            raise DataError(f"{path}: missing; run the job that makes it again") from None
        except ValueError as error:
            raise DataError(f"{path}: damaged part ({error}); remove it and run the job that makes it again") from None

    def is_whole(self, name: str) -> bool:
        """Whether a part is there and sound; a damaged one is removed, to be made again, and a line says so."""
        try:
            self._read(name)
        except FileNotFoundError:
            return False
        except ValueError as error:
            path = self.path_of(name)
            logger.warning(f"{path}: damaged part ({error}); it is made again")
            path.unlink(missing_ok=True)
            return False
        return True

    def append(self, name: str, payload: bytes | np.ndarray) -> None:
        """Append a record to this process's journal, where it survives a kill."""
        if self._journal is None:
            self._journal = open(self.folder / f"{os.getpid()}-{secrets.token_hex(4)}.journal", "xb")
        view = as_bytes(payload)
        with name_failed_writes(self.folder):
            self._journal.write(_header(self._digest, name, len(view), zlib.crc32(view)) + view)
            self._journal.flush()

    def end_journal(self) -> None:
        """Close this process's journal; the next :meth:`append` begins another one."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def records(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, payload as uint8) of every whole record of all journals; one name may come twice."""
        for path in self._journals():
            for name, payload, _ in self._records_of(path):
                yield name, payload

    def _read(self, name: str) -> np.ndarray:
        """Return the payload of a part; a ValueError says what is wrong with it."""
        data = np.fromfile(self.path_of(name), dtype=np.uint8)
        found, payload = _unseal(data, 0, self._digest)
        if found != name:
            raise ValueError(f"it holds part {found}")
        if _HEADER.size + len(payload) != len(data):
            raise ValueError(f"{len(data) - _HEADER.size - len(payload)} bytes too many")
        return payload

    def _check_recipe(self) -> None:
        found = self._written_recipe()
        if found == self.recipe:
            return
        files = self._record_files()
        if files and (found is not None or not any(_recipe_digest(path) == self._digest for path in files)):
            raise DataError(
                f"{self.folder}: holds unfinished work of another recipe ({self._difference(found)}): continue with "
                "the same settings, remove the folder, or choose another output"
            )
        path = self.folder / RECIPE_NAME
        if found is None and path.exists():
            logger.warning(f"{path}: damaged; it is written again")
        temporary = _temporary(path)
        temporary.write_text(
            json.dumps({"digest": self._digest.hex(), "recipe": self.recipe}, indent=1) + "\n", "utf-8"
        )
        os.rename(temporary, path)

    def _written_recipe(self) -> dict[str, Any] | None:
        """Return the recipe of what is in the folder; None if it is missing or not as it was written."""
        try:
            body = json.loads((self.folder / RECIPE_NAME).read_bytes())
            recipe = dict(body["recipe"])
            return recipe if recipe_of(recipe) == body["digest"] else None
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None

    def _difference(self, found: Mapping[str, Any] | None) -> str:
        if found is None:
            return f"its {RECIPE_NAME} is missing or damaged, and no part is of this recipe"
        return "; ".join(
            f"{key} {found.get(key)} there, {self.recipe.get(key)} now"
            for key in sorted({*found, *self.recipe})
            if found.get(key) != self.recipe.get(key)
        )

    def _holds_work(self) -> bool:
        """Whether the folder has records, or files of an artefact that grows in it."""
        own = {RECIPE_NAME, LOCK_NAME}
        return any(path.name not in own and ".tmp-" not in path.name for path in self.folder.iterdir())

    def _record_files(self) -> list[Path]:
        return [*self.folder.glob("*.part"), *self._journals()]

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("*.journal"))

    def _cut_journals(self) -> None:
        """Cut off what follows the last whole record of each journal: what a kill cut short, or damage."""
        for path in self._journals():
            end = max((end for _, _, end in self._records_of(path)), default=0)
            if end < path.stat().st_size:
                logger.warning(f"{path}: damaged or cut short at byte {end}; what follows is computed again")
                os.truncate(path, end)

    def _records_of(self, path: Path) -> Iterator[tuple[str, np.ndarray, int]]:
        """Yield (name, payload, first byte after it) of a journal's records, up to the first that is not whole."""
        size = path.stat().st_size
        data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray) if size else np.zeros(0, np.uint8)
        end = 0
        while end < size:
            try:
                name, payload = _unseal(data, end, self._digest)
            except ValueError:
                return
            end += _HEADER.size + len(payload)
            yield name, payload, end


class PartFile:
    """A part that is written in pieces and appears whole at :meth:`finish`."""

    def __init__(self, folder: Path, digest: bytes) -> None:
        self._folder, self._digest = folder, digest
        self._path = _temporary(folder / "part")
        self._file = open(self._path, "wb")
        self._file.write(bytes(_HEADER.size))
        self._checksum = 0
        self._size = 0

    def write(self, data: bytes | np.ndarray) -> None:
        """Append bytes."""
        view = as_bytes(data)
        with name_failed_writes(self._folder):
            self._file.write(view)
        self._checksum = zlib.crc32(view, self._checksum)
        self._size += len(view)

    def finish(self, name: str) -> None:
        """Seal the part, flush it to the disk and give it its name."""
        with name_failed_writes(self._folder):
            with self._file as file:
                file.seek(0)
                file.write(_header(self._digest, name, self._size, self._checksum))
                file.flush()
                os.fsync(file.fileno())
            os.rename(self._path, _part_path(self._folder, name))
            fsync_folder(self._folder)

    def abort(self) -> None:
        """Give up and remove what is written."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()
        self._path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return a name for a file under construction that no other process uses."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _recipe_digest(path: Path) -> bytes | None:
    """Return the recipe's digest in the first header of a file; None if it does not begin with one."""
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    return _HEADER.unpack(header)[2] if len(header) == _HEADER.size and header.startswith(_MAGIC) else None


def _part_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.part"


def _header(digest: bytes, name: str, size: int, payload_checksum: int) -> bytes:
    encoded = name.encode("ascii")
    if len(encoded) > LONGEST_NAME:
        raise ValueError(f"a record's name has at most {LONGEST_NAME} characters, not {len(encoded)}: {name!r}")
    header = _HEADER.pack(_MAGIC, 0, digest, size, encoded)
    checksum = zlib.crc32(header[_CHECKED_FROM:], payload_checksum)
    return header[:4] + struct.pack("<I", checksum) + header[_CHECKED_FROM:]


def _unseal(data: np.ndarray, start: int, digest: bytes) -> tuple[str, np.ndarray]:
    """Return name and payload of the record at byte ``start``; a ValueError says what is wrong with it."""
    header = data[start : start + _HEADER.size].tobytes()
    if len(header) < _HEADER.size:
        raise ValueError("cut short")
    magic, checksum, recipe, size, name = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ValueError("not a record of this version")
    first = start + _HEADER.size
    if size > len(data) - first:
        raise ValueError("cut short")
    payload = data[first : first + size]
    found = zlib.crc32(header[_CHECKED_FROM:], zlib.crc32(as_bytes(payload)))
    if found != checksum:
        raise ValueError(f"its checksum is {found:08x} where {checksum:08x} was written")
    if recipe != digest:
        raise ValueError("it is of another recipe")
    return name.rstrip(b"\0").decode("ascii"), payload
