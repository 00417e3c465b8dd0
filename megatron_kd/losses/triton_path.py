"""Evaluator of a tile in Triton: LM alone, and every divergence to a dense teacher except mixtures beyond KLs.

Results, collectives and the in-place gradient are those of :mod:`~megatron_kd.losses.torch_path`, which serves
the rest (sparse targets, other mixtures). A tile is read twice (three times for JSD, skew KLs and TVD), without
temporaries.
"""

import functools
import importlib.util
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.divergences import (
    Divergence,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from megatron_kd.losses.tile_buffers import HeadLogits, is_narrow
from megatron_kd.losses.tile_terms import LabelLogits, Problem, TensorParallel, Tile, TokenLosses

BLOCK = 4096
WARPS = 8
# Becomes True with a recorded run of tests/unit/losses/test_on_cuda.py; until then `auto` stays on PyTorch.
VERIFIED_ON_CUDA = False
logger = logging.getLogger(__name__)


class _Kernel(NamedTuple):
    """The ``KIND`` of :mod:`~megatron_kd.losses.triton_kernels` and its two parameters."""

    kind: int
    first: float
    second: float


_FORWARD_REVERSE_KL = 0
_KINDS: dict[type[Divergence], tuple[int, str | None]] = {
    JensenShannon: (1, "beta"),
    SkewForwardKL: (2, "alpha"),
    SkewReverseKL: (3, "alpha"),
    TotalVariation: (4, None),
}
"""``KIND`` and the attribute that is its first parameter; sums of KLs have ``_FORWARD_REVERSE_KL``."""


def use_triton(backend: str, device: torch.device) -> bool:
    """Return whether Triton's kernels serve calls with this backend and a head on this device.

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


def has_kernel(divergence: Divergence) -> bool:
    """Return whether the kernels can express a divergence."""
    return divergence.kl_weights is not None or type(divergence) in _KINDS


def reads_narrow(head: HeadLogits) -> bool:
    """Return whether the kernels take this head's logits as 16-bit products, with nothing to be done to them before."""
    return is_narrow(head.weight.dtype) and head.bias is None and head.scale == 1.0 and head.softcap is None


def evaluate(
    tile: Tile, problem: Problem, tensor_parallel: TensorParallel, with_gradient: bool, block_elements: int
) -> TokenLosses:
    """Evaluate a tile, see :data:`~megatron_kd.losses.tile_terms.Evaluate`."""
    del block_elements  # no temporaries
    label = LabelLogits.of(tile, problem)
    local = _statistics(tile, problem)
    dense = tile.teacher is not None
    maxima = tensor_parallel.max_(local[0:5:2].clone() if dense else local[0:3:2].clone())
    rows = _rescaled(local, maxima, dense) + [label.relative_to(maxima[0])]
    sums = tensor_parallel.sum_(torch.stack(rows))
    log_z = sums[: len(maxima)].log()
    logs = maxima + log_z
    kd = entropy = None
    slope_sum, kernel = logs[0], _Kernel(_FORWARD_REVERSE_KL, 0.0, 0.0)
    if tile.teacher is not None:
        kernel = _kernel(problem.objective.divergence)
        entropy = log_z[2] - sums[3] / sums[2]
        if kernel.kind == _FORWARD_REVERSE_KL:
            forward_kl = sums[4] / sums[2] - log_z[2] + log_z[1]
            reverse_kl = sums[5] / sums[1] - log_z[1] + log_z[2]
            kd = kernel.first * forward_kl + kernel.second * reverse_kl
            slope_sum = kernel.second * reverse_kl - kernel.first
        else:
            kd, slope_sum = tensor_parallel.sum_(_divergence(tile.student, tile.teacher, problem, logs, kernel))
    if with_gradient and tile.student.shape[1]:
        _gradient(tile, problem, label, logs, slope_sum.contiguous(), kernel)
    return TokenLosses(label.loss(sums[-1], log_z[0]), kd, entropy)


def _statistics(tile: Tile, problem: Problem) -> Tensor:
    """Return this rank's [9, n], in the order of ``triton_kernels.STATISTICS``."""
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
    """Return this rank's sums relative to the maxima over the ranks: Z of LM, student, teacher, then the three dots."""
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


def _divergence(student: Tensor, teacher: Tensor, problem: Problem, logs: Tensor, kernel: _Kernel) -> Tensor:
    """Return this rank's [2, n]: values, sums of slopes."""
    from megatron_kd.losses import triton_kernels as kernels

    sums = torch.zeros_like(logs[:2])
    if problem.common_columns:
        kernels.divergence_kernel[(sums.shape[1],)](
            student, teacher, logs[1], logs[2], sums, sums.shape[1], student.stride(0), teacher.stride(0),
            problem.common_columns, 1 / problem.objective.temperature, kernel.first, kernel.second,
            KIND=kernel.kind, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return sums


def _gradient(
    tile: Tile, problem: Problem, label: LabelLogits, logs: Tensor, slope_sum: Tensor, kernel: _Kernel
) -> None:
    from megatron_kd.losses import triton_kernels as kernels

    objective, student, teacher = problem.objective, tile.student, tile.teacher
    scaled = tile.weights * (problem.head_scale * problem.gradient_scale)
    kernels.gradient_kernel[(student.shape[0],)](
        student, student if teacher is None else teacher, logs[0], logs[1], logs[-1], slope_sum,
        scaled * objective.lm_weight, scaled * (objective.kd_factor / objective.temperature),
        torch.where(label.owned, label.column, -1), student.stride(0), 0 if teacher is None else teacher.stride(0),
        student.shape[1], problem.common_columns, 1 / objective.temperature,
        0.0 if problem.final_softcap is None else 1 / problem.final_softcap, kernel.first, kernel.second,
        HAS_TEACHER=teacher is not None, KIND=kernel.kind, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _kernel(divergence: Divergence) -> _Kernel:
    if divergence.kl_weights is not None:
        return _Kernel(_FORWARD_REVERSE_KL, *divergence.kl_weights)
    kind, parameter = _KINDS[type(divergence)]
    return _Kernel(kind, 0.0 if parameter is None else getattr(divergence, parameter), 0.0)


@functools.cache
def _say_available() -> None:
    logger.info(
        "losses: PyTorch backend; Triton is installed, but its kernels have no recorded run on this kind of GPU: "
        "backend=triton uses them"
    )
