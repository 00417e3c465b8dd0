"""A training checkpoint, written at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.checkpoints.checkpoint_writer import CheckpointWriter, Retention
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.training.checkpoint import Progress, description, training_state


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
    """
    writer = CheckpointWriter(checkpoints, Retention(keep))
    state = training_state(model, optimizer, groups, is_loading=False)
    writer.begin(progress.step, state, description(progress, architecture, about))
    return writer.finish()
