"""Evaluator of a tile in PyTorch, with one softmax of the student for LM and KD where they can share it, or two.

Temporaries hold about ``block_elements`` numbers each: a block of rows stays in the processor's cache from one pass
to the next. Collectives: MAX of a few rows, SUM of a few rows, and for divergences that need normalised
log-probabilities one more SUM of two rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_kd.losses.divergences import ForwardKL
from megatron_kd.losses.sparse_targets import SparseLoss, SparseTerm
from megatron_kd.losses.tile_terms import LabelLogits, Problem, TensorParallel, Tile, TokenLosses, row_blocks, row_max


def evaluate(
    tile: Tile, problem: Problem, tensor_parallel: TensorParallel, with_gradient: bool, block_elements: int
) -> TokenLosses:
    """Evaluate a tile, see :data:`~megatron_kd.losses.tile_terms.Evaluate`."""
    path = _SharedSoftmax if _can_share(tile, problem) else _SeparateSoftmaxes
    return path(tile, problem, tensor_parallel, with_gradient, block_elements).run()


def _can_share(tile: Tile, problem: Problem) -> bool:
    if problem.separate_lm or problem.final_softcap is not None:
        return False
    return tile.teacher is None or problem.objective.divergence == ForwardKL()


@dataclass
class _Evaluation:
    tile: Tile
    problem: Problem
    tensor_parallel: TensorParallel
    with_gradient: bool
    block_elements: int

    def _blocks(self) -> Iterator[slice]:
        rows, columns = self.tile.student.shape
        return row_blocks(rows, columns, self.block_elements)

    def _sparse_term(self) -> SparseTerm | None:
        tile, temperature = self.tile, self.problem.objective.temperature
        return None if tile.sparse is None else SparseTerm(tile.sparse, tile.student, self.problem, temperature)


@dataclass
class _Coefficients:
    """[n] factors of the two terms in the gradient of the raw logits."""

    lm: Tensor
    kd: Tensor


class _SharedSoftmax(_Evaluation):
    """The fast path, at temperature 1: the LM loss alone, with forward KL to a dense teacher, or a sparse target.

    Logits become this rank's softmax in place, which becomes the gradient in place: each exponential is taken once. A
    softmax over this rank's ids with maximum m has 1 / (its largest entry) as the sum Z of exp(z - m), so that no pass
    is spent on the sum.
    """

    def run(self) -> TokenLosses:
        """Evaluate the tile."""
        tile = self.tile
        label = LabelLogits.of(tile, self.problem)
        sparse = self._sparse_term()
        coefficients = self._coefficients() if self.with_gradient else None
        at_once = coefficients if self.tensor_parallel.size == 1 and sparse is None else None
        local_maxima, local = self._first_pass(at_once)
        if sparse is not None:
            sparse.sum_outside(tile.student)
        maxima = self.tensor_parallel.max_(local_maxima.clone())
        shift = local_maxima - maxima
        models = 1 if tile.teacher is None else 2
        rescaled_z = shift.exp() * local[:models]
        rows = [rescaled_z[0], label.relative_to(maxima[0])]
        if tile.teacher is not None:
            teacher_dot, student_dot = local[2] + shift[1], local[3] + shift[0]  # relative to the maxima over all ranks
            rows += [rescaled_z[1], teacher_dot * rescaled_z[1], (teacher_dot - student_dot) * rescaled_z[1]]
        if sparse is not None:
            rows += sparse.rows_to_sum(maxima[0], rescaled_z[0])
        sums = self.tensor_parallel.sum_(torch.stack(rows))
        log_z = sums[0].log()
        kd = entropy = sparse_loss = None
        if tile.teacher is not None:
            log_z_t = sums[2].log()
            entropy = log_z_t - sums[3] / sums[2]
            kd = sums[4] / sums[2] - log_z_t + log_z
        if sparse is not None:
            sparse_loss = sparse.loss(log_z, sums[2:])
            kd, entropy = sparse_loss.value, sparse_loss.entropy
        if coefficients is not None:
            if at_once is None:
                self._gradient(coefficients, rescaled_z / sums[: 2 * models : 2], sparse, sparse_loss)
            label.subtract_one_hot(tile.student, coefficients.lm)
        return TokenLosses(label.loss(sums[1], log_z), kd, entropy)

    def _coefficients(self) -> _Coefficients:
        problem = self.problem
        scaled = self.tile.weights * (problem.head_scale * problem.gradient_scale)
        return _Coefficients(scaled * problem.objective.lm_weight, scaled * problem.objective.kd_factor)

    def _first_pass(self, at_once: _Coefficients | None) -> tuple[Tensor, Tensor]:
        """Replace logits by softmaxes over this rank's ids; with ``at_once``, where these are all ids, by the gradient.

        Returns maxima [1 or 2, n], and rows [1 or 4, n]: Z of each model relative to its maximum, then with a teacher
        the means of its and the student's logits relative to their maxima, under the teacher's softmax.
        """
        student, teacher = self.tile.student, self.tile.teacher
        n = student.shape[0]
        maxima = student.new_empty((1 if teacher is None else 2, n))
        local = student.new_empty((1 if teacher is None else 4, n))
        for rows in self._blocks():
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
        return maxima, local

    def _gradient(
        self, coefficients: _Coefficients, factors: Tensor, sparse: SparseTerm | None, sparse_loss: SparseLoss | None
    ) -> None:
        """Form the gradient from softmaxes that ``factors`` [1 or 2, n] turn into probabilities over all ranks' ids."""
        student, teacher = self.tile.student, self.tile.teacher
        lm, kd = coefficients.lm, coefficients.kd
        if teacher is not None:
            student_factor, teacher_factor = factors[0] * (lm + kd), factors[1] * kd
            for rows in self._blocks():
                s = student[rows]
                s.mul_(student_factor[rows].unsqueeze(1))
                s.addcmul_(teacher[rows], teacher_factor[rows].unsqueeze(1), value=-1)
        elif sparse is not None and sparse_loss is not None:
            student.mul_((factors[0] * (lm + kd * sparse_loss.dense_coefficient)).unsqueeze(1))
            sparse.add_entries(student, factors[0], lm, kd)
        else:
            student.mul_((factors[0] * lm).unsqueeze(1))


def _z_of_softmax(probabilities: Tensor) -> Tensor:
    """Return [n] the sum of exp(z - max z), from a softmax [n, R]; 0 where R is 0."""
    if probabilities.shape[1] == 0:
        return probabilities.new_zeros(probabilities.shape[:1])
    return probabilities.amax(-1).reciprocal_()


@dataclass
class _LogNormalisers:
    """[n] logs of the sums that normalise the student's softmaxes: of its logits, and of its common logits / T."""

    lm: Tensor
    kd: Tensor


@dataclass
class _DenseLoss:
    """[n] values of a divergence; ``slope`` [n, common columns] lies where the teacher's logits did."""

    value: Tensor
    entropy: Tensor
    slope_sum: Tensor
    slope: Tensor

    def block_gradient(self, q: Tensor, rows: slice) -> Tensor:
        """Turn the probabilities ``q`` of the tokens ``rows`` into the KD gradient by logits / T, in place."""
        return q.mul_(-self.slope_sum[rows].unsqueeze(1)).add_(self.slope[rows])


class _SeparateSoftmaxes(_Evaluation):
    """The general path: any divergence, any temperature, different vocabularies, a softcap.

    The student's logits stay until the gradient is formed, so that LM and KD may take different softmaxes of them (the
    KD term is over the ids that both models have, of logits / T). The teacher's logits are replaced by the divergence's
    slope (:mod:`megatron_kd.losses.divergences`).
    """

    def run(self) -> TokenLosses:
        """Evaluate the tile."""
        tile = self.tile
        label = LabelLogits.of(tile, self.problem)
        sparse = self._sparse_term()
        maxima = self.tensor_parallel.max_(self._maxima())
        rows = self._first_sums(maxima, sparse)
        label_row = len(rows)
        rows.append(label.relative_to(maxima[0]))
        if sparse is not None:
            rows += sparse.rows_to_sum(maxima[1], torch.ones_like(maxima[1]))
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
        e_t (y - x) and e_s (x - y), where x and y are the student's and teacher's logits relative to their maxima."""
        student, teacher = self.tile.student, self.tile.teacher
        temperature = self.problem.objective.temperature
        sums = student.new_zeros((2 if teacher is None else 6, student.shape[0]))
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
        sums = log_s.new_zeros((2, log_s.shape[0]))
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


def _scaled(logits: Tensor, temperature: float, subtracted: Tensor) -> Tensor:
    """Return logits / temperature - subtracted [n], a new tensor."""
    if temperature == 1.0:
        return logits - subtracted.unsqueeze(1)
    return (logits / temperature).sub_(subtracted.unsqueeze(1))
