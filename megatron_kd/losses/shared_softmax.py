"""A chunk at temperature 1 where LM and KD share one softmax of the student: the fast path.

Covers the LM loss alone, with forward KL to a dense teacher, and with every sparse target. Exponentials replace the
logits in place and become the gradient in place: each is taken once. Collectives: one MAX and one SUM all-reduce of
a few rows, none after. A temporary of ``tile_elements`` numbers is the only memory beyond the chunk.
"""

import torch
from torch import Tensor

from megatron_kd.losses.chunk_terms import Chunk, LabelLogits, Problem, TokenLosses, row_max, row_tiles
from megatron_kd.losses.collectives import TensorParallel
from megatron_kd.losses.divergences import ForwardKL
from megatron_kd.losses.sparse_targets import SparseTerm


def applies(problem: Problem, has_dense_teacher: bool) -> bool:
    """Whether a call can take this path."""
    if problem.separate_lm or problem.final_softcap is not None:
        return False
    return not has_dense_teacher or isinstance(problem.objective.divergence, ForwardKL)


def evaluate(
    chunk: Chunk, problem: Problem, tensor_parallel: TensorParallel, with_gradient: bool, tile_elements: int
) -> TokenLosses:
    """Token losses; ``chunk.student`` becomes the gradient of the weighted loss with respect to the raw logits."""
    label = LabelLogits.of(chunk, problem)
    sparse = None if chunk.sparse is None else SparseTerm(chunk.sparse, chunk.student, problem, 1.0)
    maxima, sums = _first_pass(chunk, sparse, tile_elements)
    local_maxima = maxima.clone()
    tensor_parallel.max_(maxima)
    sums = _stack(sums, local_maxima, maxima, label, sparse)
    tensor_parallel.sum_(sums)
    log_z = sums[0].log()
    losses = TokenLosses(label.loss(sums[1], log_z))
    if chunk.teacher is not None:
        log_z_t = sums[2].log()
        losses.kd = sums[3] / sums[2] - log_z_t + log_z
        losses.entropy = log_z_t - sums[4] / sums[2]
    if sparse is not None:
        losses.kd, losses.entropy = sparse.loss(log_z, sums[2:])
    if with_gradient:
        _gradient(chunk, problem, label, sparse, (local_maxima - maxima).exp_(), sums, tile_elements)
    return losses


def _first_pass(chunk: Chunk, sparse: SparseTerm | None, tile_elements: int) -> tuple[Tensor, list[Tensor]]:
    """Replace logits by exponentials; (maxima [1 or 2, n], local sums relative to them)."""
    student, teacher = chunk.student, chunk.teacher
    n, columns = student.shape
    maxima = student.new_empty((1 if teacher is None else 2, n))
    sums = student.new_empty((1 if teacher is None else 4, n))
    for rows in row_tiles(n, columns, tile_elements):
        s = student[rows]
        maxima[0, rows] = row_max(s)
        s.sub_(maxima[0, rows].unsqueeze(1))
        if teacher is not None:
            t = teacher[rows]
            maxima[1, rows] = row_max(t)
            t.sub_(maxima[1, rows].unsqueeze(1))
            difference = t - s
            exponential = t.exp()
            sums[3, rows] = torch.linalg.vecdot(exponential, t)
            t.copy_(exponential)
            sums[1, rows] = t.sum(-1)
            sums[2, rows] = difference.mul_(t).sum(-1)
        s.exp_()
        sums[0, rows] = s.sum(-1)
    if sparse is not None:
        sparse.sum_outside(student)
    return maxima, list(sums)


def _stack(
    local: list[Tensor], local_maxima: Tensor, maxima: Tensor, label: LabelLogits, sparse: SparseTerm | None
) -> Tensor:
    """Rows to be summed over the ranks: Z, label logit, then what the KD term needs."""
    shift = local_maxima - maxima
    rescale = shift.exp()
    rows = [local[0] * rescale[0], label.relative_to(maxima[0])]
    if len(local) > 1:
        _, z_t, cross, teacher_dot = local
        rows.append(z_t * rescale[1])
        rows.append((cross + z_t * (shift[1] - shift[0])) * rescale[1])
        rows.append((teacher_dot + z_t * shift[1]) * rescale[1])
    if sparse is not None:
        rows.extend(sparse.rows_to_sum(maxima[0], rescale[0]))
    return torch.stack(rows)


def _gradient(
    chunk: Chunk,
    problem: Problem,
    label: LabelLogits,
    sparse: SparseTerm | None,
    rescale: Tensor,
    sums: Tensor,
    tile_elements: int,
) -> None:
    objective = problem.objective
    scaled = chunk.weights * (problem.head_scale * problem.gradient_scale)
    lm, kd = scaled * objective.lm_weight, scaled * objective.kd_factor
    student_factor = rescale[0] / sums[0]  # exponentials to probabilities
    if chunk.teacher is not None:
        teacher_factor = kd * rescale[1] / sums[2]
        student_factor = student_factor * (lm + kd)
        for rows in row_tiles(*chunk.student.shape, tile_elements):
            s, t = chunk.student[rows], chunk.teacher[rows]
            s.mul_(student_factor[rows].unsqueeze(1))
            s.addcmul_(t, teacher_factor[rows].unsqueeze(1), value=-1)
    elif sparse is not None:
        chunk.student.mul_((student_factor * (lm + kd * sparse.dense_coefficient())).unsqueeze(1))
        sparse.add_entries(chunk.student, student_factor, lm, kd)
    else:
        chunk.student.mul_((student_factor * lm).unsqueeze(1))
    label.subtract_one_hot(chunk.student, lm)
