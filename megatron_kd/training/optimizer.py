"""AdamW on Megatron-Core's distributed optimizer, and the learning-rate schedule.

Megatron-Core uses Transformer Engine's or Apex's FusedAdam where installed, else torch's AdamW. What it gets wrong with
the latter is fixed in ``parallel/mcore_patches/optimizer_patches.py``.
"""

import math
from dataclasses import dataclass
from typing import Iterator, Sequence

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.parallel.mcore_patches.optimizer_patches import patch_optimizer


@dataclass(frozen=True)
class OptimizerConfig:
    """The ``optimizer.*`` keys. Defaults are MiniPLM's (arXiv 2410.17215) except the rate."""

    lr: float = 1e-3
    min_lr: float | None = None
    """None means a tenth of ``lr``."""
    lr_warmup_iters: int = 0
    weight_decay: float = 0.01
    weight_decay_on_norms_and_biases: bool = True
    """MiniPLM decays every parameter; Megatron's custom is False."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-6
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.lr <= 0:
            yield f"'optimizer.lr' must be above 0, not {self.lr}"
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            yield f"'optimizer.min_lr' must be between 0 and optimizer.lr {self.lr}, not {self.min_lr}"
        for name in ("weight_decay", "clip_grad", "lr_warmup_iters"):
            if getattr(self, name) < 0:
                yield f"'optimizer.{name}' must not be negative, it is {getattr(self, name)}"
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"'optimizer.{name}' must be in [0, 1), not {getattr(self, name)}"


def learning_rate(step: int, config: OptimizerConfig, train_iters: int) -> float:
    """The rate of ``step`` (from 0): linear warm-up from 0, then half a cosine down to ``min_lr``.

    Source: MiniPLM's schedule; the first step of a warm-up has rate 0.
    """
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step < config.lr_warmup_iters:
        return config.lr * step / config.lr_warmup_iters
    done = (step - config.lr_warmup_iters) / max(1, train_iters - config.lr_warmup_iters)
    return low + 0.5 * (config.lr - low) * (1.0 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(
    config: OptimizerConfig, model: Sequence[torch.nn.Module], groups: ProcessGroupCollection, *, bf16: bool
) -> ChainedOptimizer:
    """Megatron-Core's distributed optimizer over DDP-wrapped model chunks; fp32 master weights under bf16."""
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
    overrides = {} if config.weight_decay_on_norms_and_biases else None
    optimizer = get_megatron_optimizer(
        settings, list(model), config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups
    )
    patch_optimizer(optimizer, config.weight_decay)
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, rate: float) -> None:
    """The same rate for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate
