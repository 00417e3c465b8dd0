"""Writes a run's checkpoints, one after another: built under another name, renamed when whole, old ones removed.

    begin   plan, and either write at once or copy and write in a thread while training continues
    finish  collective: manifest, rename, ``latest``, retention (old ones are removed in a thread too, if the save had
            one)

A failure in the thread is raised by ``finish``, on every rank; the previous checkpoint is untouched.
"""

import dataclasses
import json
import logging
import shutil
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

from megatron.core import dist_checkpointing

from megatron_kd.artefacts.artefact_folder import building, fsync_folder, write_file
from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.artefacts.folder_lock import LOCK_NAME
from megatron_kd.artefacts.manifest import versions, write_manifest
from megatron_kd.checkpoints.sharded_save import ShardedSave, Staging
from megatron_kd.checkpoints.sharded_state import root_cause
from megatron_kd.checkpoints.weights import (
    CHECKPOINT_KIND,
    LATEST_NAME,
    checkpoint_folders,
)
from megatron_kd.errors import UserError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.coordination import on_main_rank

logger = logging.getLogger(__name__)

FORMAT = {"backend": "torch_dist", "layout": "fully_reshardable"}
Describe = Callable[[Path, Checksums], str | None]
"""Writes the manifest of a folder whose large files have these checksums; returns why it failed, or None."""


@dataclass(frozen=True)
class Retention:
    """Rule of which checkpoints remain: the ``newest`` (None: all), and those whose step is a multiple of ``every``."""

    newest: int | None = None
    every: int | None = None

    def removes(self, folders: list[Path]) -> list[Path]:
        """Return which of ``folders`` (newest first) are removed."""
        old = folders[self.newest :] if self.newest else []
        return [folder for folder in old if not self.every or step_of(folder) % self.every]


@dataclass
class _Open:
    """A checkpoint between ``begin`` and ``finish``."""

    final: Path
    folder: Path
    save: ShardedSave
    describe: Describe
    building: ExitStack
    thread: threading.Thread | None = None


class CheckpointWriter:
    """Writes the checkpoints of one run, at most one at a time."""

    def __init__(self, checkpoints: Path, retention: Retention | None = None):
        self._checkpoints, self._retention = checkpoints, retention or Retention()
        self._open: _Open | None = None
        self._staging: Staging = {}
        self._removal: threading.Thread | None = None

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint has begun and is not finished; the same on every rank."""
        return self._open is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._open is not None and self._open.thread is not None and self._open.thread.is_alive()

    def begin(self, step: int, state: dict[str, Any], describe: Describe, *, in_background: bool = False) -> None:
        """Start ``step_<n>``. Collective over the world; an earlier one is finished first.

        Raises:
            UserError: it could not be written; the previous checkpoint is untouched.
        """
        self.finish()
        self.wait_for_removal()
        final = self._checkpoints / f"step_{step}"
        on_main_rank(lambda: _remove_from_step(self._checkpoints, step))
        stack, save = ExitStack(), ShardedSave(staging=self._staging)
        folder = Path(on_main_rank(lambda: str(stack.enter_context(building(final)))))
        self._open = _Open(final, folder, save, describe, stack)
        try:
            dist_checkpointing.save(state, str(folder), sharded_strategy=save, content_metadata=dict(FORMAT))
            if in_background:
                save.stage()
                self._open.thread = threading.Thread(target=save.write, name="checkpoint", daemon=True)
                self._open.thread.start()
            else:
                save.write()
        except Exception as error:  # this rank alone: the others wait for it inside the save
            self.abandon()
            reason = root_cause(error) + space_left(self._checkpoints)
            raise UserError(f"checkpoint {final} could not be written: {reason}") from error
        except BaseException:
            self.abandon()
            raise

    def finish(self) -> Path | None:
        """Wait for the open checkpoint, if there is one, and make it the newest. Collective over the world.

        Raises:
            UserError: it could not be written on some rank; the previous checkpoint is untouched.
        """
        if self._open is None:
            return None
        now = self._open
        if now.thread is not None:
            now.thread.join()
        failure, checksums = now.save.finish()
        failure = failure or on_main_rank(lambda: now.describe(now.folder, checksums))
        if failure is not None:
            self.abandon()
            raise UserError(f"checkpoint {now.final} could not be written: {failure}{space_left(self._checkpoints)}")
        self._open = None
        on_main_rank(now.building.close)
        on_main_rank(lambda: self._publish(now.final, in_background=now.thread is not None))
        return now.final

    def wait_for_removal(self) -> None:
        """Wait until the checkpoints that the last one replaced are removed."""
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def abandon(self) -> None:
        """Remove what there is of an open checkpoint. Not collective: it is called while an error is raised."""
        now, self._open = self._open, None
        if now is None:
            return
        if now.thread is not None:
            now.thread.join()
        error = _Abandoned()
        try:
            now.building.__exit__(_Abandoned, error, None)
        except _Abandoned:
            pass

    def _publish(self, final: Path, in_background: bool) -> None:
        write_file(self._checkpoints / LATEST_NAME, final.name + "\n")
        fsync_folder(self._checkpoints)  # before an older one is removed
        old = self._retention.removes(checkpoint_folders(self._checkpoints))
        self._removal = threading.Thread(target=_remove, args=(old,), name="old checkpoints")
        self._removal.start()
        if not in_background:
            self.wait_for_removal()


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


class _Abandoned(Exception):
    """Makes the unfinished folder be removed."""


def step_of(folder: Path) -> int:
    """Return n of ``step_<n>``."""
    return int(folder.name.removeprefix("step_"))


def space_left(folder: Path) -> str:
    """Return a question about the free space: a full disk is the usual reason, and not every error says so."""
    try:
        return f"; is the disk full ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free)?"
    except OSError:
        return ""


def _remove_from_step(checkpoints: Path, step: int) -> None:
    """Remove the checkpoints of ``step`` and later ones: damaged when the run started, or undone by a rollback."""
    for folder in checkpoint_folders(checkpoints):
        if step_of(folder) >= step:
            logger.info(f"{folder} is removed: the run resumed from an earlier checkpoint")
            shutil.rmtree(folder)


def write_checkpoint_manifest(
    folder: Path, checksums: Checksums, architecture: ModelArchitecture, about: Mapping[str, Any]
) -> None:
    """Add the checksums of files that have none yet, and write the manifest.

    Raises:
        OSError: it could not be written.
    """
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_file() and name not in checksums.files and name != LOCK_NAME:
            checksums.add_file(folder, name)
    body = {"architecture": dataclasses.asdict(architecture), "format": FORMAT, "versions": versions(), **about}
    write_manifest(folder, CHECKPOINT_KIND, json.loads(json.dumps(body)), checksums)
