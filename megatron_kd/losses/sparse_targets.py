r"""Losses against sparse teacher targets: weights t on the K ids of a token, and the mass outside of them.

With q the student's distribution, M = sum of t, Q = sum of q over the K ids, tau the tail mass:

    sampled, weighted   -sum t log q                                     gradient  M q - t
    renormalised        sum t' log(t' / q) with t' = t / M (biased)      gradient  q - t'
    ghost               sum t log(t / q) + tau log(tau / (1 - Q))        gradient  (M + tau) q - t      on the K ids
                                                                                   (M + tau - tau/(1 - Q)) q  elsewhere

``sampled`` (counts over draws, so M = 1) and ``weighted`` (importance weights, M random) are unbiased estimates of
the cross-entropy with the full teacher; they are reported as such, since a sample does not determine the teacher's
entropy. ``ghost`` treats the tail as one more id. ``renormalised`` teaches the student that nothing lies outside of
the K ids. Entries with an id of -1 count as absent. q is over the ids that both models have; weights on ids that the
student does not have are left out, so M is smaller by them (what of the tail lies there is not known and stays in tau).

Each function is over the rows of a tile; 1 - Q is summed over the other ids, not formed by subtraction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.losses.tile_terms import Problem, gather_columns, local_columns
from megatron_kd.losses.types import SparseKnowledge

SMALLEST_TAIL = 1.0e-30  # of the student's probability outside of the K ids, in its logarithm and in quotients


@dataclass
class _Entries:
    """[n, K]: this rank's columns (0 where not owned), ownership, logits / T, target weights (0 where absent)."""

    columns: Tensor
    owned: Tensor
    logits: Tensor
    targets: Tensor


class SparseTerm:
    """The sparse KD term of one tile, through its passes: entries, sums, loss, gradient."""

    def __init__(self, sparse: SparseKnowledge, student: Tensor, problem: Problem, temperature: float) -> None:
        """``student`` [n, R] holds logits still."""
        exists = (sparse.ids >= 0) & (sparse.ids < problem.common_vocab_size)
        columns, owned = local_columns(sparse.ids, problem.vocab_start, student.shape[1])
        owned &= exists
        targets = torch.where(exists, sparse.weights.to(student.dtype), 0.0)
        self.kind = sparse.kind
        self.tail = sparse.tail_mass.to(student.dtype).clamp_min(0.0)
        mass = targets.sum(-1)
        if self.kind == "renormalised":
            targets = targets / mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(1)
            mass = (mass > 0).to(mass.dtype)
        self.mass = mass
        self.entries = _Entries(columns, owned, gather_columns(student, columns) / temperature, targets)
        if self.kind == "ghost":
            self._taken = torch.zeros_like(targets)  # exponentials at the entries
            self._outside = torch.zeros_like(mass)  # sum of the exponentials of all other ids

    def sum_outside(self, exponentials: Tensor, rows: slice = slice(None)) -> None:
        """Ghost: set the K entries of ``exponentials`` (the tokens ``rows``) to zero and sum what is left over."""
        if self.kind != "ghost":
            return
        owned, columns = self.entries.owned[rows], self.entries.columns[rows]
        taken = torch.where(owned, gather_columns(exponentials, columns), 0.0)
        if exponentials.shape[1]:
            exponentials.scatter_add_(1, columns, -taken)
        self._taken[rows] = taken
        self._outside[rows] = exponentials.sum(-1)

    def rows_to_sum(self, maximum: Tensor, rescale: Tensor) -> list[Tensor]:
        """Rows [n] to be summed over the ranks: sum of t (z - max), and for ghost the tail's exponentials."""
        entries = self.entries
        relative = torch.where(entries.owned, entries.logits - maximum.unsqueeze(1), 0.0)
        rows = [(entries.targets * relative).sum(-1)]
        if self.kind == "ghost":
            rows.append(self._outside * rescale)
        return rows

    def loss(self, log_z: Tensor, sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """(KD value [n], target entropy [n] or None) from the summed rows."""
        targets = self.entries.targets
        cross_entropy = self.mass * log_z - sums[0]
        if self.kind in ("sampled", "weighted"):
            return cross_entropy, None
        entropy = -torch.xlogy(targets, targets).sum(-1)
        if self.kind == "ghost":
            log_tail = sums[1].clamp_min(SMALLEST_TAIL).log() - log_z
            self._student_tail = log_tail.exp()
            cross_entropy = cross_entropy - self.tail * log_tail
            entropy = entropy - torch.xlogy(self.tail, self.tail)
        return cross_entropy - entropy, entropy

    def dense_coefficient(self) -> Tensor:
        """[n]: the KD gradient outside of the K ids is this times q."""
        if self.kind != "ghost":
            return self.mass
        return self.mass + self.tail - self._tail_quotient()

    def add_entries(self, gradient: Tensor, probability_factor: Tensor, lm: Tensor, kd: Tensor) -> None:
        """Finish ``gradient`` [n, R] at the K ids, where :meth:`sum_outside` has set the exponentials to zero.

        ``probability_factor`` [n] makes probabilities of exponentials; ``lm`` and ``kd`` [n] weigh the two terms.
        """
        update = self.entries.targets * -kd.unsqueeze(1)
        if self.kind == "ghost":
            factor = probability_factor * (lm + kd * (self.mass + self.tail))
            update = update + self._taken * factor.unsqueeze(1)
        if gradient.shape[1]:
            gradient.scatter_add_(1, self.entries.columns, torch.where(self.entries.owned, update, 0.0))

    def block_gradient(self, q: Tensor, rows: slice) -> Tensor:
        """The KD gradient of the tokens ``rows`` by logits / T, in place of their probabilities ``q``."""
        entries = self.entries
        owned, columns = entries.owned[rows], entries.columns[rows]
        update = -entries.targets[rows]
        if self.kind == "ghost":
            taken = torch.where(owned, gather_columns(q, columns), 0.0)
            update = update + taken * (self.mass + self.tail)[rows].unsqueeze(1)
            if q.shape[1]:
                q.scatter_add_(1, columns, -taken)
        q.mul_(self.dense_coefficient()[rows].unsqueeze(1))
        if q.shape[1]:
            q.scatter_add_(1, columns, torch.where(owned, update, 0.0))
        return q

    def _tail_quotient(self) -> Tensor:
        """tau / (1 - Q), finite."""
        return self.tail / self._student_tail.clamp_min(SMALLEST_TAIL)
