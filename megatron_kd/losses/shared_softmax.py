"""Evaluator of a tile at temperature 1 where LM and KD share one softmax of the student: the fast path.

Covers the LM loss alone, with forward KL to a dense teacher, and with every sparse target. Logits become this rank's
softmax in place, which becomes the gradient in place: each exponential is taken once. A softmax over this rank's ids
with maximum m has 1 / (its largest entry) as the sum Z of exp(z - m), so that no pass is spent on the sum.
Collectives: one MAX and one SUM all-reduce of a few rows. Temporaries hold ``block_elements`` numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.losses.divergences import ForwardKL
from megatron_kd.losses.sparse_targets import SparseTerm
from megatron_kd.losses.tile_terms import LabelLogits, Problem, TensorParallel, Tile, TokenLosses, row_blocks, row_max


def applies(problem: Problem, has_dense_teacher: bool) -> bool:
    """Return whether this evaluator can serve a call."""
    if problem.separate_lm or problem.final_softcap is not None:
        return False
    return not has_dense_teacher or problem.objective.divergence == ForwardKL()


def evaluate(
    tile: Tile, problem: Problem, tensor_parallel: TensorParallel, with_gradient: bool, block_elements: int
) -> TokenLosses:
    """Evaluate a tile, see :data:`~megatron_kd.losses.tile_terms.Evaluate`."""
    label = LabelLogits.of(tile, problem)
    sparse = None if tile.sparse is None else SparseTerm(tile.sparse, tile.student, problem, 1.0)
    coefficients = _coefficients(tile, problem) if with_gradient else None
    at_once = coefficients if tensor_parallel.size == 1 and sparse is None else None
    local_maxima, local = _first_pass(tile, sparse, at_once, block_elements)
    maxima = tensor_parallel.max_(local_maxima.clone())
    shift = local_maxima - maxima
    rescaled_z = shift.exp() * local[: len(maxima)]
    rows = [rescaled_z[0], label.relative_to(maxima[0])]
    if tile.teacher is not None:
        teacher_dot, student_dot = local[2] + shift[1], local[3] + shift[0]  # relative to the maxima over all ranks
        rows += [rescaled_z[1], teacher_dot * rescaled_z[1], (teacher_dot - student_dot) * rescaled_z[1]]
    if sparse is not None:
        rows += sparse.rows_to_sum(maxima[0], rescaled_z[0])
    sums = tensor_parallel.sum_(torch.stack(rows))
    log_z = sums[0].log()
    kd = entropy = dense_coefficient = None
    if tile.teacher is not None:
        log_z_t = sums[2].log()
        entropy = log_z_t - sums[3] / sums[2]
        kd = sums[4] / sums[2] - log_z_t + log_z
    if sparse is not None:
        loss = sparse.loss(log_z, sums[2:])
        kd, entropy, dense_coefficient = loss.value, loss.entropy, loss.dense_coefficient
    if coefficients is not None:
        if at_once is None:
            factors = rescaled_z / sums[: 2 * len(maxima) : 2]
            _gradient(tile, coefficients, factors, sparse, dense_coefficient, block_elements)
        label.subtract_one_hot(tile.student, coefficients.lm)
    return TokenLosses(label.loss(sums[1], log_z), kd, entropy)


@dataclass(frozen=True)
class _Coefficients:
    """[n] factors of the two terms in the gradient of the raw logits."""

    lm: Tensor
    kd: Tensor


def _coefficients(tile: Tile, problem: Problem) -> _Coefficients:
    scaled = tile.weights * (problem.head_scale * problem.gradient_scale)
    return _Coefficients(scaled * problem.objective.lm_weight, scaled * problem.objective.kd_factor)


def _first_pass(
    tile: Tile, sparse: SparseTerm | None, at_once: _Coefficients | None, block_elements: int
) -> tuple[Tensor, Tensor]:
    """Replace logits by softmaxes over this rank's ids; with ``at_once``, where these are all ids, by the gradient.

    Returns maxima [1 or 2, n], and rows [1 or 4, n]: Z of each model relative to its maximum, then with a teacher the
    means of its and the student's logits relative to their maxima, under the teacher's softmax.
    """
    student, teacher = tile.student, tile.teacher
    n, columns = student.shape
    models = 1 if teacher is None else 2
    maxima, local = student.new_empty((models, n)), student.new_empty((1 if teacher is None else 4, n))
    for rows in row_blocks(n, columns, block_elements):  # a block stays in the cache from one pass to the next
        s = student[rows]
        maxima[0, rows] = row_max(s)
        if teacher is None:
            torch.softmax(s, -1, out=s)
            local[0, rows] = _z_of_softmax(s)
            if at_once is not None:
                s.mul_(at_once.lm[rows].unsqueeze(1))
            continue
        t = teacher[rows]
        maxima[1, rows] = row_max(t)
        s.sub_(maxima[0, rows].unsqueeze(1))
        t.sub_(maxima[1, rows].unsqueeze(1))
        p = torch.softmax(t, -1)
        local[1, rows] = _z_of_softmax(p)
        local[2, rows] = torch.linalg.vecdot(p, t)
        local[3, rows] = torch.linalg.vecdot(p, s)
        torch.softmax(s, -1, out=s)
        local[0, rows] = _z_of_softmax(s)
        if at_once is None:
            t.copy_(p)
        else:
            s.mul_((at_once.lm[rows] + at_once.kd[rows]).unsqueeze(1))
            s.addcmul_(p, at_once.kd[rows].unsqueeze(1), value=-1)
    if sparse is not None:
        sparse.sum_outside(student)
    return maxima, local


def _z_of_softmax(probabilities: Tensor) -> Tensor:
    """Return [n] the sum of exp(z - max z), from a softmax [n, R]; 0 where R is 0."""
    if probabilities.shape[1] == 0:
        return probabilities.new_zeros(probabilities.shape[:1])
    return probabilities.amax(-1).reciprocal_()


def _gradient(
    tile: Tile,
    coefficients: _Coefficients,
    factors: Tensor,
    sparse: SparseTerm | None,
    dense_coefficient: Tensor | None,
    block_elements: int,
) -> None:
    """Form the gradient from softmaxes that ``factors`` [1 or 2, n] turn into probabilities over all ranks' ids."""
    lm, kd = coefficients.lm, coefficients.kd
    if tile.teacher is not None:
        student_factor, teacher_factor = factors[0] * (lm + kd), factors[1] * kd
        n, columns = tile.student.shape
        for rows in row_blocks(n, columns, block_elements):
            s, t = tile.student[rows], tile.teacher[rows]
            s.mul_(student_factor[rows].unsqueeze(1))
            s.addcmul_(t, teacher_factor[rows].unsqueeze(1), value=-1)
    elif sparse is not None and dense_coefficient is not None:
        tile.student.mul_((factors[0] * (lm + kd * dense_coefficient)).unsqueeze(1))
        sparse.add_entries(tile.student, factors[0], lm, kd)
    else:
        tile.student.mul_((factors[0] * lm).unsqueeze(1))
