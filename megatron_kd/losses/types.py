"""Inputs and results of a distillation loss: output heads, teacher knowledge, the objective, loss sums.

Shape legend of the whole package: n tokens, h student hidden size, h_t teacher hidden size, R rows of the output
weight on this tensor-parallel rank (vocabulary ids ``vocab_start .. vocab_start + R - 1``), K entries of a sparse
target. No collectives.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.divergences import Divergence, ForwardKL

SparseTargetKind = Literal["ghost", "renormalised", "sampled", "weighted"]
SPARSE_TARGET_KINDS: tuple[SparseTargetKind, ...] = ("ghost", "renormalised", "sampled", "weighted")
PADDING_ID = -1


@dataclass(frozen=True)
class OutputHead:
    """The output layer of a model, on one tensor-parallel rank.

    ``logits = softcap(scale * (hidden @ weight.T + bias))``

    Attributes:
        weight: [R, h], this rank's rows. For the student the parameter itself: its gradient is delivered to it.
        valid_vocab_size: global ids below this are real; all others have probability exactly zero.
        vocab_start: global id of row 0.
        bias: [R] or None.
        scale: factor of the logits.
        final_softcap: ``cap`` of ``cap * tanh(logits / cap)``, or None.

    Raises:
        ConfigError: shapes or values that no output layer can have.
    """

    weight: Tensor
    valid_vocab_size: int
    vocab_start: int = 0
    bias: Tensor | None = None
    scale: float = 1.0
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ConfigError(f"an output head's weight must be [rows, hidden], not {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ConfigError(f"an output head's bias must be [{self.weight.shape[0]}], not {tuple(self.bias.shape)}")
        if self.valid_vocab_size < 1 or self.vocab_start < 0:
            raise ConfigError(
                f"an output head needs valid_vocab_size >= 1 and vocab_start >= 0, "
                f"not {self.valid_vocab_size} and {self.vocab_start}"
            )
        if self.final_softcap is not None and not self.final_softcap > 0:
            raise ConfigError(f"an output head's final_softcap must be positive, not {self.final_softcap}")
        if self.scale == 0:
            raise ConfigError("an output head's scale must not be 0")

    def rows_below(self, vocab_size: int) -> int:
        """Return how many of this rank's rows belong to global ids below ``vocab_size``."""
        return max(0, min(self.weight.shape[0], vocab_size - self.vocab_start))


@dataclass(frozen=True)
class DenseKnowledge:
    """The teacher's final hidden states and output head: its whole distribution, computed tile by tile.

    Attributes:
        hidden: [n, h_t] (or any leading shape that flattens to it), full length on every tensor-parallel rank.
        head: its rows must cover the student's interval of ids on this rank, up to the common vocabulary.
    """

    hidden: Tensor
    head: OutputHead


@dataclass(frozen=True)
class SparseKnowledge:
    """Teacher weights on K ids per token, and the probability outside of them.

    Attributes:
        ids: [n, K] int64 global ids, distinct within a token; ``PADDING_ID`` (-1) marks an unused entry.
        weights: [n, K] fp32, not negative: probabilities (ghost, renormalised), counts / draws (sampled) or
            importance weights of draws (weighted).
        tail_mass: [n] fp32, the teacher's probability outside of ``ids``.
        kind: the loss that is formed of them, see :mod:`megatron_kd.losses.sparse_targets`.
        vocab_size: the teacher's ids are 0 to vocab_size - 1; the KD term is over those that the student has too. None
            means the student's own.

    Raises:
        ConfigError: an unknown kind, or shapes that do not fit together.
    """

    ids: Tensor
    weights: Tensor
    tail_mass: Tensor
    kind: SparseTargetKind
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SPARSE_TARGET_KINDS:
            raise ConfigError(f"sparse target must be one of {', '.join(SPARSE_TARGET_KINDS)}, not {self.kind!r}")
        if self.ids.dim() != 2 or self.weights.shape != self.ids.shape or self.tail_mass.shape != self.ids.shape[:1]:
            raise ConfigError(
                f"sparse knowledge needs ids [n, K], weights [n, K] and tail_mass [n], not {tuple(self.ids.shape)}, "
                f"{tuple(self.weights.shape)} and {tuple(self.tail_mass.shape)}"
            )

    def of_tokens(self, tokens: slice) -> "SparseKnowledge":
        """Return the part for ``tokens``, as views."""
        return replace(self, ids=self.ids[tokens], weights=self.weights[tokens], tail_mass=self.tail_mass[tokens])


@dataclass(frozen=True)
class DistillationObjective:
    """Per token: ``lm_weight * LM + kd_weight * factor * D(teacher, student)``.

    Both distributions of D are softmaxes of logits / ``temperature``; the LM term always is at temperature 1.
    ``factor`` is ``temperature ** 2`` if ``temperature_squared``, which keeps the size of the KD gradient as the
    temperature grows, otherwise 1: the loss then is the divergence itself. For sparse knowledge D is given by its
    kind, ``divergence`` is not used, and the temperature divides the student's logits only: the weights are taken
    as they were made.

    Raises:
        ConfigError: a temperature that is not positive.
    """

    lm_weight: float = 1.0
    kd_weight: float = 0.0
    divergence: Divergence = field(default_factory=ForwardKL)
    temperature: float = 1.0
    temperature_squared: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"distillation temperature must be positive, not {self.temperature}")

    @property
    def kd_factor(self) -> float:
        """The factor of D in the loss."""
        return self.kd_weight * (self.temperature**2 if self.temperature_squared else 1.0)


LM_ONLY = DistillationObjective()


@dataclass(frozen=True)
class LossOutput:
    """Sums over the tokens of one call, equal on all tensor-parallel ranks. Divide once, after reducing over ranks.

    Attributes:
        loss_sum: scalar fp32, differentiable: sum of weight * (lm_weight * LM + kd factor * KD), in nats.
        token_count: scalar int64, the tokens whose weight is not zero.
        lm_sum: detached sum of weight * LM.
        kd_sum: detached sum of weight * D (without the temperature factor), or None without knowledge. The teacher's
            entropy is subtracted, except for the ``sampled`` and ``weighted`` targets, which do not determine it.
        teacher_entropy_sum: detached sum of weight * entropy of the target, or None where it is not determined.
        tail_mass_sum: detached sum of weight * tail mass, or None without sparse knowledge.
        token_lm_losses: [n] fp32 LM loss of each token (0 where the weight is 0), only when gradients are off.
    """

    loss_sum: Tensor
    token_count: Tensor
    lm_sum: Tensor
    kd_sum: Tensor | None = None
    teacher_entropy_sum: Tensor | None = None
    tail_mass_sum: Tensor | None = None
    token_lm_losses: Tensor | None = None
