"""Who speaks: one model, or two mixed token by token."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ContextManager, Iterator, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.errors import LayoutError
from megatron_kd.generation.decoder import Decoder


@dataclass(frozen=True)
class NextToken:
    """What is drawn from, and what there is to remember of the draw.

    Attributes:
        logits: [b, v] fp32, the distribution that is drawn from (its normalisation is of no matter).
        log_probabilities: one [b, v] fp32 for each of the policy's ``recorded`` names.
    """

    logits: Tensor
    log_probabilities: tuple[Tensor, ...] = ()


class Policy(Protocol):
    """Appends tokens to sequences and tells what may follow."""

    groups: ProcessGroupCollection
    recorded: tuple[str, ...]

    def decoding(self) -> ContextManager[None]:
        """The mode in which :meth:`next_token` works."""

    def next_token(self, tokens: Tensor) -> NextToken | None:
        """Append ``tokens`` [b, n]; what follows on the last pipeline stage, None elsewhere."""


class ModelPolicy:
    """A model's own distribution; records ``log_q`` if asked to."""

    def __init__(self, decoder: Decoder, record: bool = False) -> None:
        self.groups = decoder.groups
        self.recorded = ("log_q",) if record else ()
        self._decoder = decoder

    def decoding(self) -> ContextManager[None]:
        """See :class:`Policy`."""
        return self._decoder.decoding()

    def next_token(self, tokens: Tensor) -> NextToken | None:
        """See :class:`Policy`."""
        logits = self._decoder.next_token_logits(tokens)
        if logits is None:
            return None
        return NextToken(logits, (logits.log_softmax(-1),) if self.recorded else ())


class MixedPolicy:
    """alpha · teacher + (1 - alpha) · student, over the ids that both have (MiniLLM, arXiv 2306.08543, §2.2).

    Records ``log_q`` (student), ``log_p`` (teacher) and ``log_mixed`` of every token.

    Raises:
        LayoutError: the two models are laid out differently, so that their logits are on other ranks.
    """

    recorded = ("log_q", "log_p", "log_mixed")

    def __init__(self, student: Decoder, teacher: Decoder, alpha: float) -> None:
        if student.groups is not teacher.groups:
            raise LayoutError("teacher-mixed sampling needs a co-located teacher in the student's own layout")
        self.groups = student.groups
        self._student, self._teacher, self._alpha = student, teacher, alpha
        self._common = min(student.valid_vocab_size, teacher.valid_vocab_size)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """See :class:`Policy`."""
        with self._student.decoding(), self._teacher.decoding():
            yield

    def next_token(self, tokens: Tensor) -> NextToken | None:
        """See :class:`Policy`."""
        student, teacher = self._student.next_token_logits(tokens), self._teacher.next_token_logits(tokens)
        if student is None or teacher is None:
            return None
        log_q = student[:, : self._common].log_softmax(-1)
        log_p = teacher[:, : self._common].log_softmax(-1)
        mixed = mix_log_probabilities(log_p, log_q, self._alpha)
        return NextToken(mixed, (log_q, log_p, mixed))


def mix_log_probabilities(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """log(alpha · p + (1 - alpha) · q) without leaving the logarithms; alpha 0 and 1 are one side."""
    if alpha in (0.0, 1.0):
        return log_p if alpha == 1.0 else log_q
    return torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))
