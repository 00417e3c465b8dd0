"""The run folder: its lock, the checkpoint that a run there resumes from, and what the run announces at its start."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron.core.distributed import DistributedDataParallel

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.artefacts.folder_lock import LOCK_NAME, release, try_lock
from megatron_kd.checkpoints.weights import CheckpointInfo, check_same_architecture, check_same_tokenizer
from megatron_kd.config import dump_yaml
from megatron_kd.errors import CheckpointError, ConfigError
from megatron_kd.models.gpt import parameter_count
from megatron_kd.models.layer_specs import choose_layer_spec
from megatron_kd.parallel.coordination import on_main_rank
from megatron_kd.training import preflight
from megatron_kd.training.checkpoint import Progress, newest_whole_checkpoint
from megatron_kd.training.training_run import TrainingRun

logger = logging.getLogger(__name__)

_SAME_TRAINING_KEYS = ("seed", "global_batch_size")


def checkpoint_to_resume(run: TrainingRun) -> CheckpointInfo | None:
    """Return the checkpoint that the run resumes from; None where it starts. Collective over the world.

    Raises:
        ConfigError: ``output`` is not a folder.
        CheckpointError: the run was made with another tokenizer, dataset, order, batch size, method or model, or
            all checkpoints are damaged.
    """
    config = run.config
    refuse_non_folder(run.folder)
    info = newest_whole_checkpoint(run.folder / "checkpoints")
    if info is None:
        return None
    check_same_tokenizer(info, run.data)
    before = info.manifest["config"]
    pairs: list[tuple[str, Any, Any]] = [
        ("data.shuffle", before["data"]["shuffle"], config.data.shuffle),
        ("distillation.method", before["distillation"]["method"], config.distillation.method),
        ("sequence length", info.manifest["seq_length"], run.seq_length),
    ]
    pairs += [
        (f"training.{name}", before["training"][name], getattr(config.training, name)) for name in _SAME_TRAINING_KEYS
    ]
    if not config.training.allow_other_data:
        pairs.insert(0, ("dataset", info.manifest["dataset_fingerprint"], run.data.fingerprint))
    faults = [f"{name} {had} where {asked} is asked for" for name, had, asked in pairs if had != asked]
    if faults:
        raise CheckpointError(
            f"{info.path} was made with {', '.join(faults)}: choose another output or the same settings"
            + (" (training.allow_other_data=true resumes with other data)" if faults[0].startswith("dataset ") else "")
        )
    check_same_architecture(info, run.architecture)
    return info


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock, so that no other process trains there. Collective over the world.

    A folder that was made for the lock and holds nothing else is removed at the end.

    Raises:
        ConfigError: another run writes there, or ``folder`` cannot be a run folder.
    """
    lock = RunLock(folder)
    on_main_rank(lock.take)
    try:
        yield
    finally:
        lock.release()


def prepare_run_folder(run: TrainingRun) -> None:
    """Create the run folder with its ``config.yaml``. Collective over the world."""

    def create() -> None:
        with refused_as_run_folder(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
        write_file(run.folder / "config.yaml", dump_yaml(run.config))

    on_main_rank(create)


def announce(run: TrainingRun, model: list[DistributedDataParallel], progress: Progress) -> None:
    """Log one line at the start: what is trained on what, and which accelerated parts are in use."""
    if not run.runtime.is_main:
        return
    config, device = run.config, run.device
    spec = choose_layer_spec(config.model.layer_spec)
    parts = preflight.optional_parts(spec, device, config.distillation.loss.backend)
    start = f", resumed at step {progress.step}" if progress.step else ""
    source = config.teacher.source
    teacher = f", teacher {config.teacher.placement} {source}" if source else ""
    logger.info(
        f"{config.model.name} ({run.architecture.parameters:,} parameters, {parameter_count(model):,} on this rank), "
        f"{run.layout.describe()} on {device.type}, {preflight.chosen(spec, parts)}, "
        f"{config.training.precision}, {run.data.num_chunks:,} chunks{teacher}{start}"
    )
    notice = preflight.notice(parts, device)
    if notice is not None:
        logger.info(notice)


class RunLock:
    """An exclusive lock on ``<run>/.writer.lock``; the system frees it when the process that took it ends."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / LOCK_NAME
        self._file: IO[str] | None = None
        self._made: list[Path] = []

    def take(self) -> None:
        """Make the folder if there is none, and lock it at once or not at all.

        Raises:
            ConfigError: another run holds the lock, or there can be no such folder.
        """
        refuse_non_folder(self._folder)
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        while self._file is None:
            with refused_as_run_folder(self._folder):
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
        release(self._file)
        self._file = None


def refuse_non_folder(folder: Path) -> None:
    """Raise :class:`ConfigError` if something else has the name of the run folder."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is not a folder: choose another run folder")


@contextmanager
def refused_as_run_folder(folder: Path) -> Iterator[None]:
    """Turn the system's errors while ``folder`` is made into a :class:`ConfigError`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(f"output {folder} cannot be a run folder: {error.strerror}") from None
