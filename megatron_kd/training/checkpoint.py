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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

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
    sharded_weights,
    sharding_metadata,
)
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import distributed_runtime

FORMAT = {"backend": "torch_dist", "layout": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come: everything beside weights and optimizer state that a resumed run needs.

    The data position is the step: the order of chunks is a pure function of the seed and the step.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(checkpoints: Path, progress: Progress, model: Sequence[torch.nn.Module], optimizer: ChainedOptimizer,
                    groups: ProcessGroupCollection, *, architecture: ModelArchitecture, about: Mapping[str, Any],
                    keep: int | None = None) -> Path:
    """Write ``step_<n>`` and point ``latest`` at it. Collective over the world.

    Args:
        about: JSON values for the manifest (tokenizer, dataset, configuration, layout).
        keep: how many of the newest checkpoints remain; None keeps all.

    Raises:
        UserError: rank 0 could not write (a full disk, say); the previous checkpoint is untouched.
    """
    final = checkpoints / f"step_{progress.step}"
    if _on_main(lambda: final.exists()):
        return final
    state = training_state(model, optimizer, groups, is_loading=False)
    with _building_on_main(final) as folder:
        failure = _save_sharded(state, folder) or _on_main(lambda: _describe(folder, progress, architecture, about))
        if failure is not None:
            raise UserError(f"checkpoint {final} could not be written: {failure}")
    _on_main(lambda: _publish(checkpoints, final, keep))
    return final


def load_checkpoint(info: CheckpointInfo, model: Sequence[torch.nn.Module], optimizer: ChainedOptimizer,
                    groups: ProcessGroupCollection) -> Progress:
    """Fill model and optimizer from a checkpoint of any layout. Collective over the world.

    Raises:
        CheckpointError: it is damaged or of another model.
    """
    info.verify()
    loaded = load_sharded_state(training_state(model, optimizer, groups, is_loading=True), info.path)
    for i, chunk in enumerate(model):
        chunk.module.load_state_dict(loaded[f"model{i}"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    return Progress(**info.manifest["progress"])


def newest_whole_checkpoint(checkpoints: Path) -> CheckpointInfo | None:
    """The newest checkpoint that passes its checksums; damaged ones are passed over and named on the way.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    faults = []
    for folder in checkpoint_folders(checkpoints):
        try:
            info = open_checkpoint(folder)
            info.verify()
            return info
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(f"{checkpoints}: no whole checkpoint is left: {'; '.join(faults)}")
    return None


def training_state(model: Sequence[torch.nn.Module], optimizer: ChainedOptimizer, groups: ProcessGroupCollection, *,
                   is_loading: bool) -> dict[str, Any]:
    """Megatron-Core's sharded state of DDP-wrapped chunks and their optimizer."""
    state: dict[str, Any] = {f"model{i}": sharded_weights(chunk.module, groups) for i, chunk in enumerate(model)}
    weights = dict(state) if len(model) > 1 else state["model0"]
    state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading,
                                                      metadata=sharding_metadata(groups))
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
    chunks = build_model(info.architecture, layout, groups, precision=info.manifest["precision"],
                         device=torch.device("cpu"), layer_spec="local",
                         max_sequence_length=info.manifest["seq_length"])
    load_weights(chunks, groups, info)
    return chunks[0].eval(), info


def _save_sharded(state: dict[str, Any], folder: Path) -> str | None:
    """Save on all ranks; the first failure of any rank, or None."""
    failure = None
    try:
        dist_checkpointing.save(state, str(folder), content_metadata=FORMAT)
    except Exception as error:  # noqa: BLE001 - reported to the user below, on every rank
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return next((text for text in failures if text), None)


def _describe(folder: Path, progress: Progress, architecture: ModelArchitecture, about: Mapping[str, Any]) -> str | None:
    try:
        checksums = Checksums()
        for file in sorted(folder.iterdir()):
            if not file.name.endswith(".lock"):
                checksums.add_file(folder, file.name)
        body = {
            "progress": dataclasses.asdict(progress), "architecture": dataclasses.asdict(architecture),
            "format": FORMAT, "versions": versions(), **about,
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
def _building_on_main(final: Path) -> Iterator[Path]:
    """A folder that rank 0 makes and, if every rank gets through the block, renames to ``final``."""
    stack = ExitStack()
    folder = Path(_on_main(lambda: str(stack.enter_context(building(final)))))
    try:
        yield folder
    except BaseException:
        stack.__exit__(*sys.exc_info())
        raise
    _on_main(stack.close)


def _on_main(action: Callable[[], Any]) -> Any:
    """``action()`` on rank 0; its value on every rank. An error of rank 0 is raised on every rank."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [("value", action())]
        except UserError as error:
            outcome = [("error", str(error))]
        except OSError as error:
            outcome = [("error", f"{error.strerror} ({error.filename})")]
    dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome[0]
    if kind == "error":
        raise UserError(value)
    return value
