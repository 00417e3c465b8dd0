"""All weights of a checkpoint in memory, for tests that compare runs."""

from pathlib import Path
from typing import Any

import torch

from megatron_kd.checkpoints.weights import load_whole_model
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.runtime import distributed_runtime


def load_full_state(path: str | Path) -> tuple[ModelArchitecture, dict[str, torch.Tensor], dict[str, Any]]:
    """Return the architecture, name -> whole tensor, and the manifest of a checkpoint, in one process on the CPU.

    Vocabulary matrices keep their padded rows; the architecture's ``vocab_size`` says how many are real.
    """
    with distributed_runtime():
        model, info = load_whole_model(path)
        state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
        return info.architecture, state, dict(info.manifest)
