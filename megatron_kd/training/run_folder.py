"""The run folder: who writes there, whether a run can start or go on there, from which step, and what it then says.

The lock that keeps two runs from writing one run folder.
"""

import logging
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Iterator

from megatron.core.distributed import DistributedDataParallel

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.artefacts.folder_lock import LOCK_NAME, release, try_lock
from megatron_kd.checkpoints.weights import CheckpointInfo, check_same_architecture, check_same_tokenizer
from megatron_kd.config import dump_yaml
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import CheckpointError, ConfigError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import parameter_count
from megatron_kd.models.layer_specs import choose_layer_spec
from megatron_kd.parallel.coordination import on_main_rank
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.training import preflight as accelerated
from megatron_kd.training.checkpoint import Progress, newest_whole_checkpoint
from megatron_kd.training.train_config import TrainConfig

logger = logging.getLogger(__name__)

_SAME_TRAINING_KEYS = ("seed", "global_batch_size")


def checkpoint_to_resume(
    config: TrainConfig, architecture: ModelArchitecture, data: ChunkDataset
) -> CheckpointInfo | None:
    """The checkpoint from which the run folder goes on; None where it starts. Collective over the world.

    Raises:
        ConfigError: ``output`` is something else than a folder.
        CheckpointError: the run was made with another tokenizer, dataset, order, batch size, method or model, or
            all are damaged.
    """
    folder = Path(config.output)
    refuse_what_is_no_folder(folder)
    info = newest_whole_checkpoint(folder / "checkpoints")
    if info is None:
        return None
    check_same_tokenizer(info, data)
    before = info.manifest["config"]
    pairs = [
        ("data.shuffle", before["data"]["shuffle"], config.data.shuffle),
        ("distillation.method", before["distillation"]["method"], config.distillation.method),
        ("sequence length", info.manifest["seq_length"], config.data.seq_length or data.seq_length),
    ]
    pairs += [
        (f"training.{name}", before["training"][name], getattr(config.training, name)) for name in _SAME_TRAINING_KEYS
    ]
    if not config.training.allow_other_data:
        pairs.insert(0, ("dataset", info.manifest["dataset_fingerprint"], data.fingerprint))
    faults = [f"{name} {had} where {asked} is asked for" for name, had, asked in pairs if had != asked]
    if faults:
        raise CheckpointError(
            f"{info.path} was made with {', '.join(faults)}: choose another output or the same settings"
            + (" (training.allow_other_data=true goes on with other data)" if faults[0].startswith("dataset ") else "")
        )
    check_same_architecture(info, architecture)
    return info


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock: no other process trains there meanwhile. Collective over the world.

    A folder that was made for the lock and got nothing else goes again.

    Raises:
        ConfigError: another run writes there, or ``folder`` cannot be a run folder.
    """
    lock = RunLock(folder)
    on_main_rank(lock.take)
    try:
        yield
    finally:
        lock.release()


def prepare_run_folder(config: TrainConfig) -> Path:
    """Create the run folder with its ``config.yaml``. Collective over the world."""
    folder = Path(config.output)

    def create() -> None:
        with cannot_be_a_run_folder(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.yaml", dump_yaml(config))

    on_main_rank(create)
    return folder


def announce(
    config: TrainConfig,
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    model: list[DistributedDataParallel],
    data: ChunkDataset,
    runtime: Runtime,
    progress: Progress,
) -> None:
    """One line at the start: what is trained on what, and which accelerated parts are in use."""
    if not runtime.is_main:
        return
    spec = choose_layer_spec(config.model.layer_spec)
    parts = accelerated.optional_parts(spec, runtime.device, config.distillation.loss.backend)
    start = f", resumed at step {progress.step}" if progress.step else ""
    source = config.teacher.source
    teacher = f", teacher {config.teacher.placement} {source}" if source else ""
    logger.info(
        f"{config.model.name} ({architecture.parameters:,} parameters, "
        f"{parameter_count(model):,} on this rank), "
        f"{layout.describe()} on {runtime.device.type}, {accelerated.chosen(spec, parts)}, "
        f"{config.training.precision}, {data.num_chunks:,} chunks{teacher}{start}"
    )
    notice = accelerated.notice(parts, runtime.device)
    if notice is not None:
        logger.info(f"{notice}")


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
        release(self._file)
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
