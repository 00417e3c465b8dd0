"""AdamW on Megatron-Core's distributed optimizer, and the learning-rate schedule.

Megatron-Core uses Transformer Engine's or Apex's FusedAdam where installed, else torch's AdamW. What it gets wrong with
the latter is fixed in ``parallel/mcore_patches/remedies.py``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.parallel.mcore_patches.remedies import patch_optimizer
from megatron_kd.training.train_config import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, model: Sequence[DistributedDataParallel], groups: ProcessGroupCollection, *, bf16: bool
) -> ChainedOptimizer:
    """Build Megatron-Core's distributed optimizer over DDP-wrapped model chunks; fp32 master weights under bf16."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
    )
    overrides: dict[Any, Any] | None = {} if config.weight_decay_on_norms_and_biases else None
    optimizer = get_megatron_optimizer(
        settings, list(model), config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups
    )
    patch_optimizer(optimizer, config.weight_decay)
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, rate: float) -> None:
    """Set the same rate for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(step: int, config: OptimizerConfig, train_iters: int) -> float:
    """Return the rate of ``step`` (from 0): linear warm-up from 0, then half a cosine down to ``min_lr``.

    Source: MiniPLM's schedule; the first step of a warm-up has rate 0.
    """
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step < config.lr_warmup_iters:
        return config.lr * step / config.lr_warmup_iters
    done = (step - config.lr_warmup_iters) / max(1, train_iters - config.lr_warmup_iters)
    return low + 0.5 * (config.lr - low) * (1.0 + math.cos(math.pi * min(1.0, done)))
