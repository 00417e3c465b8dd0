"""How much of a step's gradient is the distillation term's: its norm over that of the LM term.

Gradients are linear in the loss, so a pass with the LM term alone is enough: what a step's own gradient has beyond it
is the distillation term's. The teacher is asked once, as in any step, and the step's gradient keeps its bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor


@dataclass(frozen=True)
class LmGradient:
    """The gradient of the weighted LM term over a global batch: what each main parameter of this rank's part of the
    optimizer has of it (``None`` without a gradient), and its norm over all ranks."""

    parts: Sequence[Tensor | None]
    norm: float

    @classmethod
    def of_prepared(cls, optimizer: ChainedOptimizer) -> "LmGradient":
        """After a backward pass of the LM term and ``prepare_grads``. Collective over the model's ranks."""
        parts = [None if p.grad is None else p.grad.clone() for p in _main_parameters(optimizer)]
        return cls(parts, float(optimizer.get_grad_norm()))

    def ratio(self, optimizer: ChainedOptimizer) -> float:
        """‖prepared gradient − this‖ / ‖this‖; the prepared gradient stays. Collective over the model's ranks."""
        parameters = _main_parameters(optimizer)
        whole = [parameter.grad for parameter in parameters]
        try:
            for parameter, lm in zip(parameters, self.parts, strict=True):
                if lm is not None:
                    parameter.grad = parameter.grad - lm
            norm = float(optimizer.get_grad_norm())
        finally:
            for parameter, gradient in zip(parameters, whole, strict=True):
                parameter.grad = gradient
        return norm / self.norm if self.norm > 0 else math.inf


def _main_parameters(optimizer: ChainedOptimizer) -> list[torch.nn.Parameter]:
    return [parameter for part in optimizer.chained_optimizers for parameter in part.get_parameters()]
