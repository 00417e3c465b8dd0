"""A tile through the Triton kernels: LM alone, and every divergence to a dense teacher except mixtures beyond KLs.

The same results, collectives and in-place gradient as :mod:`~megatron_kd.losses.separate_softmaxes`, which serves the
rest (sparse targets, other mixtures): the passes over a tile are two (three for JSD, skew KLs and TVD), without
temporaries.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.divergences import (
    Divergence,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    kl_weights,
)
from megatron_kd.losses.tile_buffers import HeadLogits, is_narrow
from megatron_kd.losses.tile_terms import LabelLogits, Problem, TensorParallel, Tile, TokenLosses
from megatron_kd.losses.types import DenseKnowledge, SparseKnowledge

BLOCK = 4096
WARPS = 8
# Becomes True with a recorded run of tests/unit/losses/test_on_cuda.py; until then `auto` stays on PyTorch.
VERIFIED_ON_CUDA = False
_log = logging.getLogger(__name__)


def use_triton(backend: str, device: torch.device) -> bool:
    """Whether the Triton kernels serve this call.

    Raises:
        ConfigError: ``triton`` was asked for where it cannot run.
    """
    if backend == "torch":
        return False
    available = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        if device.type == "cuda" and available and not VERIFIED_ON_CUDA:
            _say_available()
        return device.type == "cuda" and available and VERIFIED_ON_CUDA
    if not available:
        raise ConfigError("losses backend 'triton' needs triton, which is not installed: install it or use 'torch'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"losses backend 'triton' needs a CUDA device (or TRITON_INTERPRET=1), the head is on '{device.type}'"
        )
    return True


def has_kernels(problem: Problem, knowledge: DenseKnowledge | SparseKnowledge | None) -> bool:
    """Whether the kernels can express the call."""
    if isinstance(knowledge, SparseKnowledge):
        return False
    return knowledge is None or _kind(problem.objective.divergence) is not None


def reads_narrow(head: HeadLogits) -> bool:
    """Whether the kernels take this head's logits as 16-bit products, with nothing to be done to them in between."""
    return is_narrow(head.weight.dtype) and head.bias is None and head.scale == 1.0 and head.softcap is None


def evaluate(
    tile: Tile, problem: Problem, tensor_parallel: TensorParallel, with_gradient: bool, block_elements: int
) -> TokenLosses:
    """Token losses; ``tile.student`` becomes the gradient of the weighted loss with respect to the raw logits."""
    del block_elements  # no temporaries
    from megatron_kd.losses import triton_kernels as kernels

    label = LabelLogits.of(tile, problem)
    local = _statistics(tile, problem)
    dense = tile.teacher is not None
    maxima = tensor_parallel.max_(local[0:5:2].clone() if dense else local[0:3:2].clone())
    rows = _rescaled(local, maxima, dense) + [label.relative_to(maxima[0])]
    sums = tensor_parallel.sum_(torch.stack(rows))
    log_z = sums[: len(maxima)].log()
    logs = maxima + log_z
    losses = TokenLosses(label.loss(sums[-1], log_z[0]))
    slope_sum, parameters = logs[0], (0, 0.0, 0.0)
    if dense:
        parameters = _kind(problem.objective.divergence)
        losses.entropy = log_z[2] - sums[3] / sums[2]
        if problem.objective.divergence.raw_sums:
            forward_kl = sums[4] / sums[2] - log_z[2] + log_z[1]
            reverse_kl = sums[5] / sums[1] - log_z[1] + log_z[2]
            losses.kd = parameters[1] * forward_kl + parameters[2] * reverse_kl
            slope_sum = parameters[2] * reverse_kl - parameters[1]
        else:
            second = torch.zeros_like(logs[:2])
            if problem.common_columns:
                kernels.divergence_kernel[(len(second[0]),)](
                    tile.student, tile.teacher, logs[1], logs[2], second, second.shape[1], tile.student.stride(0),
                    tile.teacher.stride(0), problem.common_columns, 1 / problem.objective.temperature,
                    parameters[1], parameters[2], KIND=parameters[0], BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
            losses.kd, slope_sum = tensor_parallel.sum_(second)
    if with_gradient and tile.student.shape[1]:
        _gradient(tile, problem, label, logs, slope_sum.contiguous(), parameters)
    return losses


def _statistics(tile: Tile, problem: Problem) -> Tensor:
    """[9, n] of this rank, in the order of ``triton_kernels.STATISTICS``."""
    from megatron_kd.losses import triton_kernels as kernels

    student, teacher = tile.student, tile.teacher
    n, columns = student.shape
    out = student.new_zeros((kernels.STATISTICS, n), dtype=torch.float32)
    common = columns if teacher is None else problem.common_columns
    temperature = 1.0 if teacher is None else problem.objective.temperature
    kernels.statistics_kernel[(n,)](
        student, student if teacher is None else teacher, out, n, student.stride(0),
        0 if teacher is None else teacher.stride(0), columns, common, 1 / temperature,
        HAS_TEACHER=teacher is not None, SEPARATE_LM=teacher is not None and problem.separate_lm, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    return out


def _rescaled(local: Tensor, maxima: Tensor, dense: bool) -> list[Tensor]:
    """Local sums relative to the maxima over the ranks: Z of LM, student and teacher, then the three dots."""
    shift = local[0 : 2 * len(maxima) : 2] - maxima
    z = local[1 : 2 * len(maxima) : 2]
    factor = shift.exp()
    rows = list(z * factor)
    if dense:
        teacher_dot, forward, reverse = local[6:9]
        rows.append(factor[2] * (teacher_dot + z[2] * shift[2]))
        rows.append(factor[2] * (forward + z[2] * (shift[2] - shift[1])))
        rows.append(factor[1] * (reverse + z[1] * (shift[1] - shift[2])))
    return rows


def _gradient(
    tile: Tile, problem: Problem, label: LabelLogits, logs: Tensor, slope_sum: Tensor, parameters: tuple
) -> None:
    from megatron_kd.losses import triton_kernels as kernels

    objective, student, teacher = problem.objective, tile.student, tile.teacher
    scaled = tile.weights * (problem.head_scale * problem.gradient_scale)
    kernels.gradient_kernel[(student.shape[0],)](
        student, student if teacher is None else teacher, logs[0], logs[1], logs[-1], slope_sum,
        scaled * objective.lm_weight, scaled * (objective.kd_factor / objective.temperature),
        torch.where(label.owned, label.column, -1), student.stride(0), 0 if teacher is None else teacher.stride(0),
        student.shape[1], problem.common_columns, 1 / objective.temperature,
        0.0 if problem.final_softcap is None else 1 / problem.final_softcap, parameters[1], parameters[2],
        HAS_TEACHER=teacher is not None, KIND=parameters[0], BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _kind(divergence: Divergence) -> tuple[int, float, float] | None:
    """(kernel's KIND, its two parameters), or None for a mixture that the kernels do not have."""
    if divergence.raw_sums:
        return (0, *kl_weights(divergence))
    if isinstance(divergence, JensenShannon):
        return 1, divergence.beta, 0.0
    if isinstance(divergence, SkewForwardKL):
        return 2, divergence.alpha, 0.0
    if isinstance(divergence, SkewReverseKL):
        return 3, divergence.alpha, 0.0
    return (4, 0.0, 0.0) if isinstance(divergence, TotalVariation) else None


@functools.cache
def _say_available() -> None:
    _log.info(
        "losses: PyTorch backend; Triton is installed, but its kernels have no recorded run on this kind of GPU: "
        "backend=triton uses them"
    )
