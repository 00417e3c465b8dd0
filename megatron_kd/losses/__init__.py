"""Distillation losses that never hold the logits: one fused, vocabulary-parallel core with pluggable divergences.

``linear_distillation_loss`` takes hidden states and output heads and returns loss sums that carry their gradients; see
``docs/losses.md`` for formulas, collectives and memory. The names below are imported at their first use, so that a
configuration can read :mod:`~megatron_kd.losses.divergence_table` without importing torch.
"""

import importlib
from typing import Any

_NAMES = {
    "divergence_table": ("DIVERGENCES", "DivergenceEntry", "parse_divergence"),
    "divergences": (
        "Divergence",
        "ForwardKL",
        "JensenShannon",
        "Mixture",
        "ReverseKL",
        "SkewForwardKL",
        "SkewReverseKL",
        "TotalVariation",
        "divergence_from_config",
    ),
    "fused_linear": ("DEFAULT_TILE_BYTES", "linear_distillation_loss"),
    "tile_buffers": ("Workspace",),
    "types": (
        "LM_ONLY",
        "PADDING_ID",
        "SPARSE_TARGET_KINDS",
        "DenseKnowledge",
        "DistillationObjective",
        "LossOutput",
        "OutputHead",
        "SparseKnowledge",
        "SparseTargetKind",
    ),
    "weight_gradient": ("run_forward_pre_hooks",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
