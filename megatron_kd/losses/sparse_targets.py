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
student does not have are left out, so M is smaller by them (how much of the tail lies there is not known and stays in
tau).

Everything is over the rows of a tile; 1 - Q is summed over the other ids, not formed by subtraction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.losses.tile_terms import Problem, gather_columns, local_columns
from megatron_kd.losses.types import SparseKnowledge

SMALLEST_TAIL = 1.0e-30  # of the student's probability outside of the K ids, in its logarithm and in quotients


@dataclass
class SparseLoss:
    """[n] values of a tile.

    Attributes:
        value: the KD term.
        entropy: of the target, None where the target does not determine the teacher's.
        dense_coefficient: the KD gradient outside of the K ids is this times q.
    """

    value: Tensor
    entropy: Tensor | None
    dense_coefficient: Tensor


@dataclass
class _Entries:
    """[n, K]: this rank's columns (0 where not owned), ownership, logits / T, target weights (0 where absent)."""

    columns: Tensor
    owned: Tensor
    logits: Tensor
    targets: Tensor


@dataclass
class _GhostTail:
    """A ghost target's tail ``mass`` [n], and the student's exponentials ``at_entries`` [n, K] and ``outside`` [n]."""

    mass: Tensor
    at_entries: Tensor
    outside: Tensor


class SparseTerm:
    """The sparse KD term of one tile, through its passes: entries, sums, loss, gradient."""

    def __init__(self, sparse: SparseKnowledge, student: Tensor, problem: Problem, temperature: float) -> None:
        """Look the entries up in ``student`` [n, R], which still holds logits."""
        exists = (sparse.ids >= 0) & (sparse.ids < problem.common_vocab_size)
        columns, owned = local_columns(sparse.ids, problem.vocab_start, student.shape[1])
        owned &= exists
        targets = torch.where(exists, sparse.weights.to(student.dtype), 0.0)
        mass = targets.sum(-1)
        if sparse.kind == "renormalised":
            targets = targets / mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(1)
            mass = (mass > 0).to(mass.dtype)
        self._mass = mass
        self._determines_entropy = sparse.kind in ("ghost", "renormalised")
        self._entries = _Entries(columns, owned, gather_columns(student, columns) / temperature, targets)
        self._tail = None
        if sparse.kind == "ghost":
            tail_mass = sparse.tail_mass.to(student.dtype).clamp_min(0.0)
            self._tail = _GhostTail(tail_mass, torch.zeros_like(targets), torch.zeros_like(mass))

    def sum_outside(self, exponentials: Tensor, rows: slice = slice(None)) -> None:
        """Ghost: set the K entries of ``exponentials`` (the tokens ``rows``) to zero and sum the others."""
        if self._tail is None:
            return
        owned, columns = self._entries.owned[rows], self._entries.columns[rows]
        taken = torch.where(owned, gather_columns(exponentials, columns), 0.0)
        if exponentials.shape[1]:
            exponentials.scatter_add_(1, columns, -taken)
        self._tail.at_entries[rows] = taken
        self._tail.outside[rows] = exponentials.sum(-1)

    def rows_to_sum(self, maximum: Tensor, rescale: Tensor) -> list[Tensor]:
        """Return rows [n] to be summed over the ranks: sum of t (z - max), and for ghost the tail's exponentials."""
        entries = self._entries
        relative = torch.where(entries.owned, entries.logits - maximum.unsqueeze(1), 0.0)
        rows = [(entries.targets * relative).sum(-1)]
        if self._tail is not None:
            rows.append(self._tail.outside * rescale)
        return rows

    def loss(self, log_z: Tensor, sums: Tensor) -> SparseLoss:
        """Form the loss from the rows that were summed over the ranks."""
        targets = self._entries.targets
        cross_entropy = self._mass * log_z - sums[0]
        if not self._determines_entropy:
            return SparseLoss(cross_entropy, None, self._mass)
        entropy = -torch.xlogy(targets, targets).sum(-1)
        coefficient = self._mass
        if self._tail is not None:
            mass = self._tail.mass
            log_tail = sums[1].clamp_min(SMALLEST_TAIL).log() - log_z
            cross_entropy = cross_entropy - mass * log_tail
            entropy = entropy - torch.xlogy(mass, mass)
            coefficient = self._mass + mass - mass / log_tail.exp().clamp_min(SMALLEST_TAIL)
        return SparseLoss(cross_entropy - entropy, entropy, coefficient)

    def add_entries(self, gradient: Tensor, probability_factor: Tensor, lm: Tensor, kd: Tensor) -> None:
        """Finish ``gradient`` [n, R] at the K ids, where :meth:`sum_outside` has set the exponentials to zero.

        ``probability_factor`` [n] makes probabilities of exponentials; ``lm`` and ``kd`` [n] weigh the two terms.
        """
        update = self._entries.targets * -kd.unsqueeze(1)
        if self._tail is not None:
            factor = probability_factor * (lm + kd * (self._mass + self._tail.mass))
            update = update + self._tail.at_entries * factor.unsqueeze(1)
        if gradient.shape[1]:
            gradient.scatter_add_(1, self._entries.columns, torch.where(self._entries.owned, update, 0.0))

    def block_gradient(self, dense_coefficient: Tensor, q: Tensor, rows: slice) -> Tensor:
        """Turn the probabilities ``q`` of the tokens ``rows`` into the KD gradient by logits / T, in place.

        ``dense_coefficient`` [n] is that of the tile's :class:`SparseLoss`.
        """
        owned, columns = self._entries.owned[rows], self._entries.columns[rows]
        update = -self._entries.targets[rows]
        if self._tail is not None:
            taken = torch.where(owned, gather_columns(q, columns), 0.0)
            update = update + taken * (self._mass + self._tail.mass)[rows].unsqueeze(1)
            if q.shape[1]:
                q.scatter_add_(1, columns, -taken)
        q.mul_(dense_coefficient[rows].unsqueeze(1))
        if q.shape[1]:
            q.scatter_add_(1, columns, torch.where(owned, update, 0.0))
        return q
