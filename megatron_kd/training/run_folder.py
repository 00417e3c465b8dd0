"""The run folder: who writes there, whether a run can start or go on there, from which step, and what it then says."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from megatron.core.distributed import DistributedDataParallel

from megatron_kd.config import dump_yaml
from megatron_kd.data.artefact_folder import write_file
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import parameter_count
from megatron_kd.models.layer_specs import choose_layer_spec
from megatron_kd.models.loading import check_same_tokenizer
from megatron_kd.models.weights import CheckpointInfo, check_same_architecture
from megatron_kd.parallel.agreement import on_main_rank
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.training import accelerated
from megatron_kd.training.checkpoint import Progress, newest_whole_checkpoint
from megatron_kd.training.config import TrainConfig
from megatron_kd.training.run_lock import RunLock, cannot_be_a_run_folder, refuse_what_is_no_folder

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
    where = config.teacher.cache_path if config.teacher.placement == "cached" else config.teacher.path
    teacher = f", teacher {config.teacher.placement} {where}" if where else ""
    sys.stderr.write(
        f"train: {config.model.name} ({architecture.parameters:,} parameters, "
        f"{parameter_count(model):,} on this rank), "
        f"{layout.describe()} on {runtime.device.type}, {accelerated.chosen(spec, parts)}, "
        f"{config.training.precision}, {data.num_chunks:,} chunks{teacher}{start}\n"
    )
    notice = accelerated.notice(parts, runtime.device)
    if notice is not None:
        sys.stderr.write(f"train: {notice}\n")
