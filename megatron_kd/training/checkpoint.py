"""Training checkpoints: weights, optimizer state and progress, loadable under any tensor x pipeline x data layout.

    <run>/checkpoints/step_<n>/    Megatron-Core's torch_dist files, manifest.json, checksums.json
    <run>/checkpoints/latest       the name of the newest whole checkpoint

A checkpoint is written into a folder of another name, flushed, described and only then renamed; ``latest`` follows.
"""

import dataclasses
import json
import shutil
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kd.data.artefact_folder import building, write_file
from megatron_kd.data.checksums import Checksums
from megatron_kd.data.manifest import versions, write_manifest
from megatron_kd.errors import CheckpointError, UserError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import HiddenStateGPTModel, build_model
from megatron_kd.models.weights import (
    CHECKPOINT_KIND,
    LATEST_NAME,
    CheckpointInfo,
    checkpoint_folders,
    load_sharded_state,
    load_weights,
    open_checkpoint,
    root_cause,
    sharded_weights,
    sharding_metadata,
)
from megatron_kd.parallel.agreement import on_main_rank
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.survival import Incidents

_UNTOLD = "another rank could not write"
FORMAT = {"backend": "torch_dist", "layout": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come: everything beside weights and optimizer state that a resumed run needs.

    The order of chunks is a pure function of the seed and the position.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    incidents: Incidents = field(default_factory=Incidents)

    @property
    def position(self) -> int:
        """The next global batch, counted from the start of the run: skipped ones count."""
        return self.step + self.incidents.skipped_batches

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "Progress":
        """What a checkpoint's manifest says."""
        values = dict(manifest["progress"])
        return cls(**{**values, "incidents": Incidents.from_mapping(values.get("incidents"))})


def save_checkpoint(
    checkpoints: Path,
    progress: Progress,
    model: Sequence[torch.nn.Module],
    optimizer: ChainedOptimizer,
    groups: ProcessGroupCollection,
    *,
    architecture: ModelArchitecture,
    about: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Write ``step_<n>`` and point ``latest`` at it. Collective over the world.

    Args:
        about: JSON values for the manifest (tokenizer, dataset, configuration, layout).
        keep: how many of the newest checkpoints remain; None keeps all.

    Raises:
        UserError: rank 0 could not write (a full disk, say); the previous checkpoint is untouched.
    """
    state = training_state(model, optimizer, groups, is_loading=False)
    return _save(
        checkpoints, progress.step, state, lambda folder: _describe(folder, progress, architecture, about), keep
    )


def take_part_in_save(checkpoints: Path, step: int) -> None:
    """What a rank without a part of the student does while the others are in :func:`save_checkpoint`."""
    _save(checkpoints, step, {}, lambda _: None, None)


def _save(
    checkpoints: Path, step: int, state: dict[str, Any], describe: Callable[[Path], str | None], keep: int | None
) -> Path:
    final = checkpoints / f"step_{step}"
    on_main_rank(lambda: _remove_passed_over(checkpoints, step))
    with _building_on_main_rank(final) as folder:
        failure = _save_sharded(state, folder) or on_main_rank(lambda: describe(folder))
        if failure is not None:
            raise UserError(f"checkpoint {final} could not be written: {failure}{_space_left(checkpoints)}")
    on_main_rank(lambda: _publish(checkpoints, final, keep))
    return final


def load_checkpoint(
    info: CheckpointInfo, model: Sequence[torch.nn.Module], optimizer: ChainedOptimizer, groups: ProcessGroupCollection
) -> Progress:
    """Fill model and optimizer from a checkpoint of any layout. Collective over the world.

    Args:
        info: as :func:`newest_whole_checkpoint` gives it, its checksums compared.

    Raises:
        CheckpointError: it is of another model.
    """
    loaded = load_sharded_state(training_state(model, optimizer, groups, is_loading=True), info.path)
    for i, chunk in enumerate(model):
        chunk.module.load_state_dict(loaded[f"model{i}"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    return Progress.from_manifest(info.manifest)


def take_part_in_load(checkpoints: Path) -> None:
    """What a rank without a part of the student does while the others find and load the newest whole checkpoint."""
    info = newest_whole_checkpoint(checkpoints)
    if info is not None:
        load_sharded_state({}, info.path)


def newest_whole_checkpoint(checkpoints: Path) -> CheckpointInfo | None:
    """The newest checkpoint that passes its checksums. Collective over the world; rank 0 reads the files.

    Newer ones that are damaged are passed over, each with a line on stderr.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    folder = on_main_rank(lambda: _find_whole(checkpoints))
    return None if folder is None else open_checkpoint(folder)


def training_state(
    model: Sequence[torch.nn.Module], optimizer: ChainedOptimizer, groups: ProcessGroupCollection, *, is_loading: bool
) -> dict[str, Any]:
    """Megatron-Core's sharded state of DDP-wrapped chunks and their optimizer."""
    state: dict[str, Any] = {f"model{i}": sharded_weights(chunk.module, groups) for i, chunk in enumerate(model)}
    weights = dict(state) if len(model) > 1 else state["model0"]
    state["optimizer"] = optimizer.sharded_state_dict(
        weights, is_loading=is_loading, metadata=sharding_metadata(groups)
    )
    return state


def load_full_state(path: str | Path) -> tuple[ModelArchitecture, dict[str, torch.Tensor], dict[str, Any]]:
    """All weights of a checkpoint on the CPU, in one process: architecture, name -> whole tensor, manifest.

    Vocabulary matrices keep their padded rows; the architecture's ``vocab_size`` says how many are real.
    """
    with distributed_runtime():
        model, info = load_whole_model(path)
        state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
        return info.architecture, state, dict(info.manifest)


def load_whole_model(path: str | Path) -> tuple[HiddenStateGPTModel, CheckpointInfo]:
    """An unsharded model with a checkpoint's weights, inside a world of one rank."""
    info = open_checkpoint(path)
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    groups = create_process_groups(layout)
    chunks = build_model(
        info.architecture,
        layout,
        groups,
        precision=info.manifest["precision"],
        device=torch.device("cpu"),
        layer_spec="local",
        max_sequence_length=info.manifest["seq_length"],
    )
    load_weights(chunks, groups, info)
    return chunks[0].eval(), info


def _find_whole(checkpoints: Path) -> Path | None:
    faults = []
    for folder in checkpoint_folders(checkpoints):
        try:
            open_checkpoint(folder).verify()
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            sys.stderr.write(f"train: a damaged checkpoint is passed over, going on from {folder.name}: {fault}\n")
        return folder
    if faults:
        raise CheckpointError(f"{checkpoints}: no whole checkpoint is left: {'; '.join(faults)}")
    return None


def _remove_passed_over(checkpoints: Path, step: int) -> None:
    """Remove what is there of ``step`` and later ones: a run only comes here if they were damaged when it started."""
    for folder in checkpoint_folders(checkpoints):
        if int(folder.name.removeprefix("step_")) >= step:
            shutil.rmtree(folder)


def _save_sharded(state: dict[str, Any], folder: Path) -> str | None:
    """Save on all ranks; why it failed, the same text on every rank, or None.

    Raises:
        UserError: this rank alone could not go on; the others are still waiting for it inside the save.
    """
    failure = None
    try:
        dist_checkpointing.save(state, str(folder), content_metadata=FORMAT)
    except CheckpointException as error:  # raised on every rank, with the reasons on one of them
        failure = root_cause(error) if error.failures else _UNTOLD
    except Exception as error:  # noqa: BLE001 - torch and Megatron-Core raise a dozen types here
        final, reason = folder.name.split(".tmp")[0], root_cause(error) + _space_left(folder.parent)
        raise UserError(f"checkpoint {final} could not be written: {reason}") from error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return min((text for text in failures if text), key=lambda text: text == _UNTOLD, default=None)


def _space_left(folder: Path) -> str:
    """A full disk is the usual reason, and newer Megatron-Cores do not say which error their writers met."""
    return f"; is the disk full ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free)?"


def _describe(
    folder: Path, progress: Progress, architecture: ModelArchitecture, about: Mapping[str, Any]
) -> str | None:
    try:
        checksums = Checksums()
        for file in sorted(folder.iterdir()):
            if not file.name.endswith(".lock"):
                checksums.add_file(folder, file.name)
        body = {
            "progress": dataclasses.asdict(progress),
            "architecture": dataclasses.asdict(architecture),
            "format": FORMAT,
            "versions": versions(),
            **about,
        }
        write_manifest(folder, CHECKPOINT_KIND, json.loads(json.dumps(body)), checksums)
    except OSError as error:
        return f"{error.strerror} ({error.filename or folder})"
    return None


def _publish(checkpoints: Path, final: Path, keep: int | None) -> None:
    write_file(checkpoints / LATEST_NAME, final.name + "\n")
    for old in checkpoint_folders(checkpoints)[keep:] if keep else []:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _building_on_main_rank(final: Path) -> Iterator[Path]:
    """A folder that rank 0 makes and, if every rank gets through the block, renames to ``final``."""
    stack = ExitStack()
    folder = Path(on_main_rank(lambda: str(stack.enter_context(building(final)))))
    try:
        yield folder
    except BaseException:
        stack.__exit__(*sys.exc_info())
        raise
    on_main_rank(stack.close)
