"""MiniLLM written out in float64 over whole distributions, and over all sequences of a tiny vocabulary.

A toy policy is a table of logits for every prefix, so that its gradient over all sequences is exact. Nothing is shared
with the package.
"""

import itertools
import math

import torch
from torch import Tensor

VOCABULARY, LENGTH, END = 4, 3, 0


def prefixes() -> list[tuple[int, ...]]:
    """Every prefix that a sequence can have before its next token: no END inside, shorter than LENGTH."""
    inner = range(1, VOCABULARY)
    return [prefix for n in range(LENGTH) for prefix in itertools.product(inner, repeat=n)]


def sequences() -> list[tuple[int, ...]]:
    """Every whole sequence: it ends with END or has LENGTH tokens."""
    ended = [(*prefix, END) for prefix in prefixes()]
    return ended + list(itertools.product(range(1, VOCABULARY), repeat=LENGTH))


def random_table(seed: int) -> Tensor:
    """Logits [prefixes, vocabulary], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(prefixes()), VOCABULARY, generator=generator, dtype=torch.float64)


def token_log_probabilities(table: Tensor, sequence: tuple[int, ...]) -> Tensor:
    """[length] log-probabilities of a sequence's tokens, with the graph."""
    index = {prefix: i for i, prefix in enumerate(prefixes())}
    rows = torch.stack([table[index[sequence[:t]]] for t in range(len(sequence))])
    return rows.log_softmax(-1).gather(1, torch.tensor(sequence).unsqueeze(1)).squeeze(1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q || p) over whole sequences."""
    total = torch.zeros((), dtype=torch.float64)
    for sequence in sequences():
        log_q = token_log_probabilities(student, sequence).sum()
        log_p = token_log_probabilities(teacher, sequence).sum()
        total = total + log_q.exp() * (log_q - log_p)
    return total


def mixed_log_probabilities(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """log of the distribution that tokens are drawn from."""
    return torch.log(alpha * log_p.exp() + (1 - alpha) * log_q.exp())


def paper_gradient_by_enumeration(
    student: Tensor, teacher: Tensor, alpha: float, clip: float | None, length_norm: bool
) -> Tensor:
    """The expectation over p̃ of the paper's approximate gradient (token weights), formula by formula."""
    index = {prefix: i for i, prefix in enumerate(prefixes())}
    gradient = torch.zeros_like(student)
    q_table, p_table = student.softmax(-1), teacher.softmax(-1)
    for sequence in sequences():
        log_q, log_p = (token_log_probabilities(t, sequence) for t in (student, teacher))
        drawn = mixed_log_probabilities(log_p, log_q, alpha)
        probability = drawn.sum().exp()
        reward = [float(p - q) for p, q in zip(log_p, log_q)]
        for t, token in enumerate(sequence):
            row = index[sequence[:t]]
            q, p = q_table[row], p_table[row]
            weight = float((log_q[t] - drawn[t]).exp())
            kl = float((q * (q / p).log()).sum())
            exact = q * ((q / p).log() - kl)
            later = reward[t + 1 :]
            to_come = sum(later) / (len(later) if length_norm and later else 1)
            factor = weight
            if clip is not None and ((to_come > 0 and weight > 1 + clip) or (to_come < 0 and weight < 1 - clip)):
                factor = 0.0
            one_hot = torch.zeros(VOCABULARY, dtype=torch.float64)
            one_hot[token] = 1.0
            score = one_hot - q  # gradient of log q(token)
            gradient[row] += probability * (weight * exact - factor * to_come * score)
    return gradient


def released_advantages(
    rewards: list[list[float]], scaling: float, limit: float, discount: float, places: list[int]
) -> list[list[float]]:
    """Scaled, clipped, discounted, divided by what is left, whitened, each row padded by zeros to its ``places``."""
    rows = []
    for row in rewards:
        scaled = [max(-limit, min(limit, value / scaling)) for value in row]
        length = len(scaled)
        rows.append([
            sum(discount ** (k - t) * scaled[k] for k in range(t, length)) / (length - t) for t in range(length)
        ])  # fmt: skip
    padded = [value for row, n in zip(rows, places) for value in row + [0.0] * (n - len(row))]
    mean = sum(padded) / len(padded)
    variance = sum((value - mean) ** 2 for value in padded) / len(padded)
    return [[(value - mean) / math.sqrt(variance + 1e-8) for value in row] for row in rows]
