"""Distillation losses that never hold the logits: one fused, vocabulary-parallel core with pluggable divergences.

``linear_distillation_loss`` takes hidden states and output heads and gives the loss sums and gradients; see
``docs/losses.md`` for formulas, collectives and memory.
"""

from megatron_kd.losses.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    divergence_from_config,
)
from megatron_kd.losses.fused_linear import DEFAULT_TILE_BYTES, linear_distillation_loss
from megatron_kd.losses.tile_buffers import Workspace
from megatron_kd.losses.types import (
    LM_ONLY,
    PADDING_ID,
    SPARSE_TARGET_KINDS,
    DenseKnowledge,
    DistillationObjective,
    LossOutput,
    OutputHead,
    SparseKnowledge,
    SparseTargetKind,
)
from megatron_kd.losses.weight_gradient import run_forward_pre_hooks

__all__ = [
    "DEFAULT_TILE_BYTES",
    "DenseKnowledge",
    "DistillationObjective",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "LM_ONLY",
    "LossOutput",
    "Mixture",
    "OutputHead",
    "PADDING_ID",
    "ReverseKL",
    "SPARSE_TARGET_KINDS",
    "SkewForwardKL",
    "SkewReverseKL",
    "SparseKnowledge",
    "SparseTargetKind",
    "TotalVariation",
    "Workspace",
    "divergence_from_config",
    "linear_distillation_loss",
    "run_forward_pre_hooks",
]
