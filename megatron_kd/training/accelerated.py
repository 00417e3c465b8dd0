"""Optional accelerated parts: which are installed, which a run uses, which no recorded GPU run has tried yet."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core import optimizer as megatron_optimizer

from megatron_kd.losses.triton_path import use_triton

RECORDED: frozenset[str] = frozenset()
"""Parts with a recorded GPU run in ``benchmarks/results``; add a name together with its file."""
LAYERS, TRITON = "Transformer Engine's layers", "the losses' Triton kernels"


@dataclass(frozen=True)
class Part:
    """An optional part: whether its library is installed, and whether this run uses it."""

    name: str
    is_installed: bool
    is_used: bool


def optional_parts(spec: Literal["te", "local"], device: torch.device, loss_backend: str = "auto") -> list[Part]:
    """Transformer Engine, a FusedAdam, Triton, as a run on ``device`` with ``distillation.loss.backend`` finds them."""
    picks_triton = device.type == "cuda" and loss_backend == "auto" and use_triton("auto", device)
    library = megatron_optimizer.Adam.__module__.split(".")[0]
    is_fused = library in ("transformer_engine", "apex")
    return [
        Part(LAYERS, _is_installed("transformer_engine"), spec == "te"),
        Part(f"{library if is_fused else 'apex'}'s FusedAdam", is_fused or _is_installed("apex"), is_fused),
        Part(TRITON, _is_installed("triton"), picks_triton or loss_backend == "triton"),
    ]


def chosen(spec: Literal["te", "local"], parts: list[Part]) -> str:
    """What computes layers, updates and losses, in a few words."""
    _, adam, triton = parts
    return f"{spec} layers, {adam.name if adam.is_used else 'AdamW of torch'}, losses in {_losses(triton)}"


def notice(parts: list[Part], device: torch.device) -> str | None:
    """One line: which of them are in use or only installed, and which have no recorded run; None if it says nothing.

    On a CPU a part that is installed and not in use is no choice, and not named.
    """
    named = [part for part in parts if part.is_used or (part.is_installed and device.type == "cuda")]
    untried = [part.name for part in named if part.name not in RECORDED]
    if not untried:
        return None
    states = ", ".join(f"{part.name} {'in use' if part.is_used else 'installed but not in use'}" for part in named)
    advice = ": compare with a run without them" if any(part.is_used for part in named) else ""
    advice += " (model.layer_spec=local)" if advice and parts[0].is_used else ""
    return f"accelerated parts: {states}; without a recorded GPU run of this project: {', '.join(untried)}{advice}"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _losses(triton: Part) -> str:
    return "Triton" if triton.is_used else "PyTorch"
