"""A tile in general: any divergence, any temperature, different vocabularies, a softcap.

The student's logits stay until the gradient is formed, so that LM and KD may take different softmaxes of them (the KD
term is over the ids that both models have, of logits / T). The teacher's logits are replaced by the divergence's slope
(:mod:`megatron_kd.losses.divergences`). Collectives: MAX of a few rows, SUM of a few rows, and for divergences that
need normalised log-probabilities one more SUM of two rows. Temporaries hold about ``block_elements`` numbers each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.losses.divergences import kl_weights
from megatron_kd.losses.sparse_targets import SparseTerm
from megatron_kd.losses.tile_terms import LabelLogits, Problem, TensorParallel, Tile, TokenLosses, row_blocks, row_max


@dataclass
class _Normalisers:
    """[n] log of the normaliser of each softmax, of logits (LM) and of logits / T (KD student, teacher)."""

    lm: Tensor
    student: Tensor
    teacher: Tensor | None = None


@dataclass
class _DenseResult:
    value: Tensor
    entropy: Tensor
    slope_sum: Tensor


def evaluate(
    tile: Tile, problem: Problem, tensor_parallel: TensorParallel, with_gradient: bool, block_elements: int
) -> TokenLosses:
    """Token losses; ``tile.student`` becomes the gradient of the weighted loss with respect to the raw logits."""
    label = LabelLogits.of(tile, problem)
    sparse = None
    if tile.sparse is not None:
        sparse = SparseTerm(tile.sparse, tile.student, problem, problem.objective.temperature)
    maxima = _maxima(tile, problem)
    tensor_parallel.max_(maxima)
    rows = _first_sums(tile, problem, maxima, sparse, block_elements)
    rows.append(label.relative_to(maxima[0]))
    if sparse is not None:
        rows.extend(sparse.rows_to_sum(maxima[1], torch.ones_like(maxima[1])))
    sums = tensor_parallel.sum_(torch.stack(rows))
    logs = _Normalisers(maxima[0] + sums[0].log(), maxima[1] + sums[1].log())
    dense = None
    if tile.teacher is not None:
        label_row = 6
        logs.teacher = maxima[2] + sums[2].log()
        dense = _dense_value(tile, problem, logs, sums, tensor_parallel, with_gradient, block_elements)
    else:
        label_row = 2
    losses = TokenLosses(label.loss(sums[label_row], sums[0].log()))
    if dense is not None:
        losses.kd, losses.entropy = dense.value, dense.entropy
    if sparse is not None:
        losses.kd, losses.entropy = sparse.loss(sums[1].log(), sums[3:])
    if with_gradient:
        _gradient(tile, problem, label, sparse, dense, logs, block_elements)
    return losses


def _maxima(tile: Tile, problem: Problem) -> Tensor:
    """[2 or 3, n]: of the student's logits, of its common logits / T, of the teacher's / T."""
    temperature = problem.objective.temperature
    student = row_max(tile.student)
    common = student if problem.common_vocab_size == problem.student_vocab_size else row_max(_common(tile, problem))
    rows = [student, common / temperature]
    if tile.teacher is not None:
        rows.append(row_max(tile.teacher) / temperature)
    return torch.stack(rows)


def _first_sums(
    tile: Tile, problem: Problem, maxima: Tensor, sparse: SparseTerm | None, block_elements: int
) -> list[Tensor]:
    """Local rows: Z of LM, Z of the student; with a teacher also Z_t, sum of e_t y, of e_t (y - x), of e_s (x - y)."""
    temperature = problem.objective.temperature
    n, columns = tile.student.shape
    sums = tile.student.new_zeros((2 if tile.teacher is None else 6, n))
    has_kd = tile.teacher is not None or sparse is not None
    common = _common(tile, problem)
    for rows in row_blocks(n, columns, block_elements):
        if problem.separate_lm or not has_kd:
            sums[0, rows] = (tile.student[rows] - maxima[0, rows].unsqueeze(1)).exp_().sum(-1)
        if not has_kd:
            continue
        x = _scaled(common[rows], temperature, maxima[1, rows])
        e_s = x.exp()
        sums[1, rows] = e_s.sum(-1)
        if tile.teacher is not None:
            y = _scaled(tile.teacher[rows], temperature, maxima[2, rows])
            e_t = y.exp()
            sums[2, rows] = e_t.sum(-1)
            sums[3, rows] = torch.linalg.vecdot(e_t, y)
            if problem.objective.divergence.raw_sums:
                difference = y.sub_(x)
                sums[5, rows] = -torch.linalg.vecdot(e_s, difference)
                sums[4, rows] = torch.linalg.vecdot(e_t, difference)
        if sparse is not None:
            sparse.sum_outside(e_s, rows)
    if not problem.separate_lm and has_kd:
        sums[0] = sums[1]
    elif not has_kd:
        sums[1] = sums[0]
    return list(sums)


def _dense_value(
    tile: Tile,
    problem: Problem,
    logs: _Normalisers,
    sums: Tensor,
    tensor_parallel: TensorParallel,
    with_gradient: bool,
    block_elements: int,
) -> _DenseResult:
    """The divergence of each token; with gradients ``tile.teacher`` becomes its slope."""
    log_z_s, log_z_t = sums[1].log(), sums[2].log()
    entropy = log_z_t - sums[3] / sums[2]
    divergence = problem.objective.divergence
    if divergence.raw_sums:
        forward, reverse = kl_weights(divergence)
        forward_kl = sums[4] / sums[2] - log_z_t + log_z_s
        reverse_kl = sums[5] / sums[1] - log_z_s + log_z_t
        if with_gradient:
            _replace_by_slope(tile, problem, logs, block_elements)
        return _DenseResult(forward * forward_kl + reverse * reverse_kl, entropy, reverse * reverse_kl - forward)
    second = torch.stack(_replace_by_slope(tile, problem, logs, block_elements))
    tensor_parallel.sum_(second)
    return _DenseResult(second[0], entropy, second[1])


def _replace_by_slope(tile: Tile, problem: Problem, logs: _Normalisers, block_elements: int) -> list[Tensor]:
    """Teacher logits to slopes, in place; local [values, slope sums]."""
    objective = problem.objective
    common = _common(tile, problem)
    values, slope_sums = torch.zeros_like(logs.lm), torch.zeros_like(logs.lm)
    for rows in row_blocks(*tile.student.shape, block_elements):
        log_q = _scaled(common[rows], objective.temperature, logs.student[rows])
        log_p = _scaled(tile.teacher[rows], objective.temperature, logs.teacher[rows])
        values[rows], slope = objective.divergence.value_and_slope(log_p, log_q)
        slope_sums[rows] = slope.sum(-1)
        tile.teacher[rows] = slope
    return [values, slope_sums]


def _gradient(
    tile: Tile,
    problem: Problem,
    label: LabelLogits,
    sparse: SparseTerm | None,
    dense: _DenseResult | None,
    logs: _Normalisers,
    block_elements: int,
) -> None:
    objective = problem.objective
    scaled = tile.weights * (problem.head_scale * problem.gradient_scale)
    lm, kd = scaled * objective.lm_weight, scaled * (objective.kd_factor / objective.temperature)
    for rows in row_blocks(*tile.student.shape, block_elements):
        logits = tile.student[rows]
        gradient = (logits - logs.lm[rows].unsqueeze(1)).exp_().mul_(lm[rows].unsqueeze(1))
        label.subtract_one_hot(gradient, lm[rows], rows)
        if dense is not None or sparse is not None:
            q = _scaled(_common(tile, problem)[rows], objective.temperature, logs.student[rows]).exp_()
            if dense is not None:
                kd_gradient = q.mul_(-dense.slope_sum[rows].unsqueeze(1)).add_(tile.teacher[rows])
            else:
                kd_gradient = sparse.block_gradient(q, rows)
            gradient[:, : problem.common_columns].addcmul_(kd_gradient, kd[rows].unsqueeze(1))
        if problem.final_softcap is not None:
            gradient.mul_((logits / problem.final_softcap).square_().neg_().add_(1.0))
        logits.copy_(gradient)


def _common(tile: Tile, problem: Problem) -> Tensor:
    return tile.student[:, : problem.common_columns]


def _scaled(logits: Tensor, temperature: float, subtracted: Tensor) -> Tensor:
    """logits / temperature - subtracted [n], as a new tensor."""
    if temperature == 1.0:
        return logits - subtracted.unsqueeze(1)
    return (logits / temperature).sub_(subtracted.unsqueeze(1))
