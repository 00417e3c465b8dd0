"""Which optional accelerated parts a run uses, and which of them no recorded GPU run of this project has tried yet."""

from typing import Literal

import torch
from megatron.core import optimizer as megatron_optimizer

from megatron_kd.losses.triton_path import use_triton

RECORDED: frozenset[str] = frozenset()
"""Parts with a recorded GPU run in ``benchmarks/results``; add a name together with its file."""
LAYERS, TRITON = "Transformer Engine's layers (model.layer_spec=local avoids them)", "the losses' Triton kernels"


def parts_in_use(spec: Literal["te", "local"], device: torch.device) -> list[str]:
    """Names of the accelerated parts that a run on ``device`` uses."""
    parts = [LAYERS] if spec == "te" else []
    library = megatron_optimizer.Adam.__module__.split(".")[0]
    if library in ("transformer_engine", "apex"):
        parts.append(f"{library}'s FusedAdam")
    if device.type == "cuda" and use_triton("auto", device):
        parts.append(TRITON)
    return parts


def warning(parts: list[str]) -> str | None:
    """One line that names the parts in use without a recorded GPU run; None if there are none."""
    untried = [part for part in parts if part not in RECORDED]
    if not untried:
        return None
    names = ", ".join(untried)
    return f"in use without a recorded GPU run of this project yet: {names}: compare with a run without them"
