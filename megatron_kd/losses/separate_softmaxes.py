"""Evaluator of a tile in general: any divergence, any temperature, different vocabularies, a softcap.

The student's logits stay until the gradient is formed, so that LM and KD may take different softmaxes of them (the KD
term is over the ids that both models have, of logits / T). The teacher's logits are replaced by the divergence's slope
(:mod:`megatron_kd.losses.divergences`). Collectives: MAX of a few rows, SUM of a few rows, and for divergences that
need normalised log-probabilities one more SUM of two rows. Temporaries hold about ``block_elements`` numbers each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_kd.losses.sparse_targets import SparseTerm
from megatron_kd.losses.tile_terms import LabelLogits, Problem, TensorParallel, Tile, TokenLosses, row_blocks, row_max


def evaluate(
    tile: Tile, problem: Problem, tensor_parallel: TensorParallel, with_gradient: bool, block_elements: int
) -> TokenLosses:
    """Evaluate a tile, see :data:`~megatron_kd.losses.tile_terms.Evaluate`."""
    return _Evaluation(tile, problem, tensor_parallel, with_gradient, block_elements).run()


@dataclass(frozen=True)
class _LogNormalisers:
    """[n] logs of the sums that normalise the student's softmaxes: of its logits, and of its common logits / T."""

    lm: Tensor
    kd: Tensor


@dataclass(frozen=True)
class _DenseLoss:
    """[n] values of a divergence; ``slope`` [n, common columns] lies where the teacher's logits did."""

    value: Tensor
    entropy: Tensor
    slope_sum: Tensor
    slope: Tensor

    def block_gradient(self, q: Tensor, rows: slice) -> Tensor:
        """Turn the probabilities ``q`` of the tokens ``rows`` into the KD gradient by logits / T, in place."""
        return q.mul_(-self.slope_sum[rows].unsqueeze(1)).add_(self.slope[rows])


@dataclass(frozen=True)
class _Evaluation:
    tile: Tile
    problem: Problem
    tensor_parallel: TensorParallel
    with_gradient: bool
    block_elements: int

    def run(self) -> TokenLosses:
        """Evaluate the tile."""
        tile, problem = self.tile, self.problem
        label = LabelLogits.of(tile, problem)
        temperature = problem.objective.temperature
        sparse = None if tile.sparse is None else SparseTerm(tile.sparse, tile.student, problem, temperature)
        maxima = self.tensor_parallel.max_(self._maxima())
        rows = self._first_sums(maxima, sparse)
        label_row = len(rows)
        rows.append(label.relative_to(maxima[0]))
        if sparse is not None:
            rows.extend(sparse.rows_to_sum(maxima[1], torch.ones_like(maxima[1])))
        sums = self.tensor_parallel.sum_(torch.stack(rows))
        logs = _LogNormalisers(maxima[0] + sums[0].log(), maxima[1] + sums[1].log())
        kd = entropy = kd_gradient = None
        if tile.teacher is not None:
            dense = self._dense_loss(tile.teacher, sums, logs.kd, maxima[2] + sums[2].log())
            kd, entropy, kd_gradient = dense.value, dense.entropy, dense.block_gradient
        if sparse is not None:
            loss = sparse.loss(sums[1].log(), sums[label_row + 1 :])
            kd, entropy, kd_gradient = loss.value, loss.entropy, partial(sparse.block_gradient, loss.dense_coefficient)
        if self.with_gradient:
            self._gradient(label, logs, kd_gradient)
        return TokenLosses(label.loss(sums[label_row], sums[0].log()), kd, entropy)

    def _maxima(self) -> Tensor:
        """Return [2 or 3, n]: of the student's logits, of its common logits / T, of the teacher's / T."""
        temperature = self.problem.objective.temperature
        student = row_max(self.tile.student)
        is_whole = self.problem.common_vocab_size == self.problem.student_vocab_size
        rows = [student, (student if is_whole else row_max(self._common)) / temperature]
        if self.tile.teacher is not None:
            rows.append(row_max(self.tile.teacher) / temperature)
        return torch.stack(rows)

    def _first_sums(self, maxima: Tensor, sparse: SparseTerm | None) -> list[Tensor]:
        """Return this rank's rows: Z of LM, Z of the student; with a teacher also Z_t and the sums of e_t y,
        e_t (y - x) and e_s (x - y), where x and y are student's and teacher's logits relative to their maxima."""
        student, teacher = self.tile.student, self.tile.teacher
        temperature = self.problem.objective.temperature
        sums = student.new_zeros((2 if teacher is None else 6, len(student)))
        has_kd = teacher is not None or sparse is not None
        for rows in self._blocks():
            if self.problem.separate_lm or not has_kd:
                sums[0, rows] = (student[rows] - maxima[0, rows].unsqueeze(1)).exp_().sum(-1)
            if not has_kd:
                continue
            x = _scaled(self._common[rows], temperature, maxima[1, rows])
            e_s = x.exp()
            sums[1, rows] = e_s.sum(-1)
            if teacher is not None:
                y = _scaled(teacher[rows], temperature, maxima[2, rows])
                e_t = y.exp()
                sums[2, rows] = e_t.sum(-1)
                sums[3, rows] = torch.linalg.vecdot(e_t, y)
                if self.problem.objective.divergence.kl_weights is not None:
                    difference = y.sub_(x)
                    sums[5, rows] = -torch.linalg.vecdot(e_s, difference)
                    sums[4, rows] = torch.linalg.vecdot(e_t, difference)
            if sparse is not None:
                sparse.sum_outside(e_s, rows)
        if not self.problem.separate_lm and has_kd:
            sums[0] = sums[1]
        elif not has_kd:
            sums[1] = sums[0]
        return list(sums)

    def _dense_loss(self, teacher: Tensor, sums: Tensor, log_s: Tensor, log_t: Tensor) -> _DenseLoss:
        """Evaluate the divergence; with gradients the teacher's logits become its slope.

        ``log_s`` and ``log_t`` [n] are the logs of the normalisers of the student's and the teacher's softmax.
        """
        log_z_s, log_z_t = sums[1].log(), sums[2].log()
        entropy = log_z_t - sums[3] / sums[2]
        weights = self.problem.objective.divergence.kl_weights
        if weights is None:
            value, slope_sum = self.tensor_parallel.sum_(self._replace_by_slope(teacher, log_s, log_t))
            return _DenseLoss(value, entropy, slope_sum, teacher)
        forward, reverse = weights
        forward_kl = sums[4] / sums[2] - log_z_t + log_z_s
        reverse_kl = sums[5] / sums[1] - log_z_s + log_z_t
        if self.with_gradient:
            self._replace_by_slope(teacher, log_s, log_t)
        value = forward * forward_kl + reverse * reverse_kl
        return _DenseLoss(value, entropy, reverse * reverse_kl - forward, teacher)

    def _replace_by_slope(self, teacher: Tensor, log_s: Tensor, log_t: Tensor) -> Tensor:
        """Turn the teacher's logits into slopes, in place, and return this rank's [2, n]: values, sums of slopes."""
        objective = self.problem.objective
        sums = torch.zeros((2, *log_s.shape), dtype=log_s.dtype, device=log_s.device)
        for rows in self._blocks():
            log_q = _scaled(self._common[rows], objective.temperature, log_s[rows])
            log_p = _scaled(teacher[rows], objective.temperature, log_t[rows])
            sums[0, rows], slope = objective.divergence.value_and_slope(log_p, log_q)
            sums[1, rows] = slope.sum(-1)
            teacher[rows] = slope
        return sums

    def _gradient(
        self, label: LabelLogits, logs: _LogNormalisers, kd_gradient: Callable[[Tensor, slice], Tensor] | None
    ) -> None:
        """Replace the student's logits; ``kd_gradient`` turns a block of q into the KD gradient by logits / T."""
        tile, problem, objective = self.tile, self.problem, self.problem.objective
        scaled = tile.weights * (problem.head_scale * problem.gradient_scale)
        lm, kd = scaled * objective.lm_weight, scaled * (objective.kd_factor / objective.temperature)
        for rows in self._blocks():
            logits = tile.student[rows]
            gradient = (logits - logs.lm[rows].unsqueeze(1)).exp_().mul_(lm[rows].unsqueeze(1))
            label.subtract_one_hot(gradient, lm[rows], rows)
            if kd_gradient is not None:
                q = _scaled(self._common[rows], objective.temperature, logs.kd[rows]).exp_()
                gradient[:, : problem.common_columns].addcmul_(kd_gradient(q, rows), kd[rows].unsqueeze(1))
            if problem.final_softcap is not None:
                gradient.mul_((logits / problem.final_softcap).square_().neg_().add_(1.0))
            logits.copy_(gradient)

    @property
    def _common(self) -> Tensor:
        return self.tile.student[:, : self.problem.common_columns]

    def _blocks(self) -> Iterator[slice]:
        rows, columns = self.tile.student.shape
        return row_blocks(rows, columns, self.block_elements)


def _scaled(logits: Tensor, temperature: float, subtracted: Tensor) -> Tensor:
    """Return logits / temperature - subtracted [n], a new tensor."""
    if temperature == 1.0:
        return logits - subtracted.unsqueeze(1)
    return (logits / temperature).sub_(subtracted.unsqueeze(1))
