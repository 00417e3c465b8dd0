"""Training checkpoints: weights, optimizer state and progress, loadable under any tensor x pipeline x data layout.

    <run>/checkpoints/step_<n>/    Megatron-Core's torch_dist files, manifest.json, checksums.json
    <run>/checkpoints/latest       the name of the newest whole checkpoint

``checkpoints/checkpoint_writer.py`` writes them.
"""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.checkpoints.checkpoint_writer import (
    Describe,
    write_checkpoint_manifest,
)
from megatron_kd.checkpoints.sharded_state import sharded_weights, sharding_metadata
from megatron_kd.checkpoints.weights import (
    CheckpointInfo,
    checkpoint_folders,
    load_sharded_state,
    open_checkpoint,
)
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.coordination import on_main_rank
from megatron_kd.training.fault_tolerance import FaultHistory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run has come: everything beside weights and optimizer state that a resumed run needs.

    The order of chunks is a pure function of the seed and the position, so it is not part of it.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    faults: FaultHistory = field(default_factory=FaultHistory)

    @property
    def position(self) -> int:
        """Number of the next global batch, counted from the start of the run; skipped ones count."""
        return self.step + self.faults.skipped_batches

    def to_mapping(self) -> dict[str, Any]:
        """Return the values that a checkpoint's manifest keeps under ``progress``."""
        values = dataclasses.asdict(self)
        faults = values.pop("faults")
        return {**values, "incidents": faults}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "Progress":
        """Read the progress from a checkpoint's manifest."""
        values = dict(manifest["progress"])
        return cls(faults=FaultHistory.from_mapping(values.pop("incidents", None)), **values)


def load_checkpoint(
    info: CheckpointInfo,
    model: Sequence[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    groups: ProcessGroupCollection,
) -> Progress:
    """Fill model and optimizer from a checkpoint of any layout. Collective over the world.

    Args:
        info: what :func:`newest_whole_checkpoint` returned, its checksums compared.

    Raises:
        CheckpointError: it was made with another model.
    """
    loaded = load_sharded_state(training_state(model, optimizer, groups, is_loading=True), info.path)
    for i, model_chunk in enumerate(model):
        model_chunk.module.load_state_dict(loaded[f"model{i}"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    return Progress.from_manifest(info.manifest)


def newest_whole_checkpoint(checkpoints: Path) -> CheckpointInfo | None:
    """Return the newest checkpoint that passes its checksums. Collective over the world; rank 0 reads the files.

    Newer ones that are damaged are skipped, each with a line on stderr. None if there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    folder = on_main_rank(lambda: _find_whole(checkpoints))
    return None if folder is None else open_checkpoint(folder)


def training_state(
    model: Sequence[DistributedDataParallel],
    optimizer: ChainedOptimizer,
    groups: ProcessGroupCollection,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """Return Megatron-Core's sharded state of DDP-wrapped model chunks and their optimizer."""
    state: dict[str, Any] = {
        f"model{i}": sharded_weights(model_chunk.module, groups) for i, model_chunk in enumerate(model)
    }
    weights = dict(state) if len(model) > 1 else state["model0"]
    state["optimizer"] = optimizer.sharded_state_dict(
        weights, is_loading=is_loading, metadata=sharding_metadata(groups)
    )
    return state


def _find_whole(checkpoints: Path) -> Path | None:
    faults = []
    for folder in checkpoint_folders(checkpoints):
        try:
            open_checkpoint(folder).verify()
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            logger.info(f"skipping a damaged checkpoint, resuming from {folder.name}: {fault}")
        return folder
    if faults:
        raise CheckpointError(f"{checkpoints}: no whole checkpoint is left: {'; '.join(faults)}")
    return None


def description(
    progress: Progress,
    architecture: ModelArchitecture,
    about: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> Describe:
    """Return a function that writes the manifest of a training checkpoint.

    Args:
        about: JSON values for the manifest (tokenizer, dataset, configuration, layout).
        files: further small files, name -> contents, written before it.
    """

    def describe(folder: Path, checksums: Checksums) -> str | None:
        try:
            for name, contents in (files or {}).items():
                write_file(folder / name, contents)
            write_checkpoint_manifest(folder, checksums, architecture, {"progress": progress.to_mapping(), **about})
        except OSError as error:
            return f"{error.strerror} ({error.filename or folder})"
        return None

    return describe
