"""One optimizer step: gradients of all micro-batches, their norm, a check that all is finite, the update.

:class:`LmGradient` tells how much of a step's gradient is the distillation term's: its norm over that of the LM term.
Gradients are linear in the loss, so one more pass, with the LM term alone, is enough: what the step's own gradient has
beyond it is the distillation term's. The teacher is asked once, as in any step, and the step's gradient keeps its bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.errors import NonFiniteLossError
from megatron_kd.parallel.groups import is_last_stage, sum_over_group
from megatron_kd.parallel.mcore_patches.remedies import clipped_step, gather_parameters
from megatron_kd.parallel.schedule import run_schedule
from megatron_kd.teachers.interface import Teacher
from megatron_kd.training.objective import MicroBatchLoss
from megatron_kd.training.optimizer import set_learning_rate


@dataclass(frozen=True)
class LmGradient:
    """The gradient of the weighted LM term over a global batch.

    Attributes:
        parts: for each main parameter of this rank's part of the optimizer; None for one without a gradient.
        norm: over all ranks.
    """

    parts: Sequence[Tensor | None]
    norm: float

    @classmethod
    def of_prepared(cls, optimizer: ChainedOptimizer) -> "LmGradient":
        """Copy it after a backward pass of the LM term and ``prepare_grads``. Collective over the model's ranks."""
        parts = [None if p.grad is None else p.grad.clone() for p in _main_parameters(optimizer)]
        return cls(parts, float(optimizer.get_grad_norm()))

    def ratio(self, optimizer: ChainedOptimizer) -> float:
        """Return ‖prepared gradient − this‖ / ‖this‖; the prepared gradient stays.

        Collective over the model's ranks.
        """
        parameters = _main_parameters(optimizer)
        whole = [parameter.grad for parameter in parameters]
        try:
            for parameter, gradient, lm in zip(parameters, whole, self.parts, strict=True):
                if gradient is not None and lm is not None:
                    parameter.grad = gradient - lm
            norm = float(optimizer.get_grad_norm())
        finally:
            for parameter, gradient in zip(parameters, whole, strict=True):
                parameter.grad = gradient
        return norm / self.norm if self.norm > 0 else math.inf


def _main_parameters(optimizer: ChainedOptimizer) -> list[torch.nn.Parameter]:
    return [parameter for part in optimizer.chained_optimizers for parameter in part.get_parameters()]


@dataclass(frozen=True)
class StepResult:
    """What a step reports: means over the global batch in nats, the gradient's norm before clipping, its tokens.

    Attributes:
        extra: means of what the method reports beside these; ``kd_lm_gradient_ratio`` where it was asked for.
    """

    loss: float
    lm_loss: float
    kd_loss: float
    teacher_entropy: float
    grad_norm: float
    tokens: int
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainStep:
    """The parts that every step uses; calling it performs one.

    Attributes:
        model: the student's DDP-wrapped model chunks on this rank.
        lm_term: the LM term of ``micro_batch_loss`` alone, for the ratio of the gradients' norms.
    """

    model: Sequence[DistributedDataParallel]
    optimizer: ChainedOptimizer
    groups: ProcessGroupCollection
    micro_batch_loss: MicroBatchLoss
    teacher: Teacher | None
    clip_grad: float
    lm_term: MicroBatchLoss | None = None

    def __call__(
        self,
        batches: Sequence[Batch],
        learning_rate: float,
        *,
        scheduled: bool = True,
        with_gradient_ratio: bool = False,
    ) -> StepResult:
        """Update the weights with this rank's micro-batches of one global batch.

        Args:
            scheduled: they are the next ones of the training data's schedule (see ``Teacher.begin_step``).
            with_gradient_ratio: report ``kd_lm_gradient_ratio`` too, which takes a pass with ``lm_term`` first.

        Raises:
            NonFiniteLossError: the loss or the gradient's norm is not finite; the weights are as before.
        """
        lm_gradient = self._lm_gradient(batches) if with_gradient_ratio else None
        self._zero_gradients()
        if self.teacher is not None:
            asked = [batch for batch in batches if self.micro_batch_loss.needs_knowledge(batch)]
            self.teacher.begin_step(asked, scheduled=scheduled)
        result = self._finish(self._reduce(self._gradients(self.micro_batch_loss, batches)))
        if lm_gradient is not None:
            result.extra["kd_lm_gradient_ratio"] = lm_gradient.ratio(self.optimizer)
        set_learning_rate(self.optimizer, learning_rate)
        clipped_step(self.optimizer, result.grad_norm, self.clip_grad)
        return result

    def gather_parameters(self) -> None:
        """Bring all weights up to date on all ranks, for what reads them outside DDP's forward pass."""
        gather_parameters(self.model)

    def _gradients(self, loss: MicroBatchLoss, batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
        """Add the gradients of a loss, and return what it reports for each micro-batch."""
        rows, seq_length = batches[0].tokens.shape
        return run_schedule(self.model, self.groups, loss, batches, seq_length=seq_length, micro_batch_size=rows)

    def _lm_gradient(self, batches: Sequence[Batch]) -> LmGradient:
        assert self.lm_term is not None  # built where the configuration asks for ratios
        self._zero_gradients()
        self._gradients(self.lm_term, batches)
        self.optimizer.prepare_grads()
        return LmGradient.of_prepared(self.optimizer)

    def _zero_gradients(self) -> None:
        for model_chunk in self.model:
            model_chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _reduce(self, reports: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Add up the reports of all data-parallel ranks' micro-batches, on every rank."""
        device = next(self.model[0].parameters()).device
        names = self.micro_batch_loss.reported
        sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        if is_last_stage(self.groups) and self.groups.tp.rank() == 0:
            for report in reports:
                sums += report["sums"]
        return dict(zip(names, sum_over_group(sums, self.groups.intra_dist_opt).tolist()))

    def _finish(self, sums: dict[str, float]) -> StepResult:
        count = max(1.0, sums["count"])
        self.optimizer.prepare_grads()
        gradient_norm = float(self.optimizer.get_grad_norm())
        result = StepResult(
            loss=sums["loss"] / count,
            lm_loss=sums["lm"] / count,
            kd_loss=sums["kd"] / count,
            teacher_entropy=sums["teacher_entropy"] / count,
            grad_norm=gradient_norm,
            tokens=int(sums["tokens"]),
            extra={name: sums[name] / count for name in self.micro_batch_loss.extra},
        )
        if not (math.isfinite(result.loss) and math.isfinite(gradient_norm)):
            raise NonFiniteLossError(f"loss {result.loss} with gradient norm {gradient_norm} is not finite")
        return result
