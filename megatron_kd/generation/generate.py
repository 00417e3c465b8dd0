"""The decoding loop: prompts of any lengths in, sequences out, the same on every rank of the model.

All sequences stand at the same position: decoding starts after the shortest prompt, and a sequence whose prompt is
longer takes the prompt's id instead of a drawn one. So no row is padded on the left, and positions are true. The policy
that draws is one model, or two mixed token by token. Shapes: b sequences, v ids.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ContextManager, Iterator, Protocol, Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.random_numbers import uniforms
from megatron_kd.errors import DataError, LayoutError
from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generation_config import SamplingConfig
from megatron_kd.parallel.groups import is_last_stage


@dataclass(frozen=True)
class NextToken:
    """The distribution of the next token, and what is recorded of the draw.

    Attributes:
        logits: [b, v] fp32, up to a constant per row.
        log_probabilities: one [b, v] fp32 for each of the policy's ``recorded`` names.
    """

    logits: Tensor
    log_probabilities: tuple[Tensor, ...] = ()


class Policy(Protocol):
    """Appends tokens to sequences and gives the distribution of the next one."""

    @property
    def groups(self) -> ProcessGroupCollection:
        """Process groups of the model's layout."""

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the log-probabilities that each draw records."""

    def decoding(self) -> ContextManager[None]:
        """Return the context in which :meth:`next_token` works."""

    def next_token(self, tokens: Tensor) -> NextToken | None:
        """Append ``tokens`` [b, n]; return what follows on the last pipeline stage, None elsewhere."""


class ModelPolicy:
    """A model's own distribution.

    Args:
        record: record its log-probabilities as ``log_q``.
    """

    def __init__(self, decoder: Decoder, record: bool = False) -> None:
        self.groups = decoder.groups
        self.recorded: tuple[str, ...] = ("log_q",) if record else ()
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

    recorded: tuple[str, ...] = ("log_q", "log_p", "log_mixed")

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
    """Return log(alpha · p + (1 - alpha) · q) without leaving the logarithms; alpha 0 and 1 give one side."""
    if alpha in (0.0, 1.0):
        return log_p if alpha == 1.0 else log_q
    return torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))


@dataclass(frozen=True)
class Generated:
    """Finished sequences.

    Attributes:
        tokens: int64 [b, max_length], prompt and response, ``pad_id`` after the end.
        lengths: int64 [b], tokens of each sequence, its end-of-sequence id included.
        prompt_lengths: int64 [b].
        log_probabilities: for each name that the policy records, fp32 [b, max_length]: log-probability of the token at
            that place given those before it; 0 in prompts and after the end. Empty before the last pipeline stage.
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    log_probabilities: dict[str, Tensor]


def generate(
    policy: Policy,
    prompts: Sequence[np.ndarray],
    seeds: np.ndarray,
    *,
    max_length: int,
    eos_id: int | None,
    pad_id: int,
    sampling: SamplingConfig = SamplingConfig(),
    device: torch.device = torch.device("cpu"),
) -> Generated:
    """Continue every prompt until ``eos_id`` or ``max_length`` tokens. Collective over the model's ranks.

    Args:
        policy: its caches are empty, with room for this many sequences and tokens.
        prompts: ids of each sequence, at least one.
        seeds: uint64 [b]; a sequence's text depends on its prompt and seed, not on the rest of the batch.
        max_length: tokens of prompt and response together; a prompt of that length gets no response.

    Raises:
        DataError: a prompt is empty or longer than ``max_length``.
    """
    ids, lengths = _lay_out(prompts, max_length, pad_id, device)
    with policy.decoding():
        return _decode(policy, ids, lengths, seeds, eos_id, sampling)


def _decode(
    policy: Policy, ids: Tensor, lengths: Tensor, seeds: np.ndarray, eos_id: int | None, sampling: SamplingConfig
) -> Generated:
    """Fill ``ids`` [b, max_length], which holds the prompts, from left to right."""
    start, max_length = int(lengths.min()), ids.shape[1]
    is_last = is_last_stage(policy.groups)
    records = [ids.new_zeros(ids.shape, dtype=torch.float32) for _ in policy.recorded] if is_last else []
    ends = torch.full_like(lengths, max_length)
    next_token = policy.next_token(ids[:, :start]) if start < max_length else None
    for position in range(start, max_length):
        in_prompt, ended = position < lengths, position >= ends
        drawn = _draw(next_token, seeds, position, sampling, policy.groups, ids[:, position])
        writes = ~in_prompt & ~ended
        ids[:, position] = torch.where(writes, drawn, ids[:, position])
        if next_token is not None:
            _record(records, next_token, ids[:, position], writes, position)
        if eos_id is not None:
            ends = torch.where(writes & (drawn == eos_id), position + 1, ends)
            if bool((ends <= position + 1).all()):
                break
        if position + 1 == max_length:
            break
        next_token = policy.next_token(ids[:, position : position + 1])
    return Generated(ids, ends, lengths, dict(zip(policy.recorded, records)))


def _lay_out(
    prompts: Sequence[np.ndarray], max_length: int, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) < 1 or max(lengths) > max_length:
        raise DataError(
            f"prompts of {min(lengths)} to {max(lengths)} tokens where 1 to {max_length} fit: shorten the prompts or "
            "raise the length"
        )
    ids = np.full((len(prompts), max_length), pad_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return torch.from_numpy(ids).to(device), torch.tensor(lengths, device=device)


def _draw(
    next_token: NextToken | None,
    seeds: np.ndarray,
    position: int,
    sampling: SamplingConfig,
    groups: ProcessGroupCollection,
    like: Tensor,
) -> Tensor:
    """Draw the tokens [b] on the last stage, and send them to every stage."""
    tokens = torch.empty_like(like)
    if next_token is not None:
        tokens.copy_(choose(next_token.logits, torch.from_numpy(uniforms(seeds, position)), sampling))
    if groups.pp.size() > 1:
        dist.broadcast(tokens, group=groups.pp, group_src=groups.pp.size() - 1)
    return tokens


def _record(records: list[Tensor], next_token: NextToken, tokens: Tensor, writes: Tensor, position: int) -> None:
    for record, values in zip(records, next_token.log_probabilities):
        chosen = values.gather(1, tokens.clamp_max(values.shape[1] - 1).unsqueeze(1)).squeeze(1)
        record[:, position] = torch.where(writes, chosen, 0.0)


def sampling_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Return the logits [b, v] of the distribution to draw from: divided by the temperature, -inf for what is left out.

    ``top_k`` keeps the k most probable ids (and those equal to the last of them), then ``top_p`` the fewest of the most
    probable ids whose probabilities reach p.
    """
    if config.temperature not in (0.0, 1.0):
        logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[:, -1:], -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= config.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def choose(logits: Tensor, draws: Tensor, config: SamplingConfig) -> Tensor:
    """Draw the next token of each sequence, int64 [b], by inversion of the cumulative distribution.

    The token is the first, ids in ascending order, whose cumulative probability exceeds the draw.

    Args:
        logits: [b, v], or log-probabilities.
        draws: [b] uniform in [0, 1); unused at temperature 0.
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    cumulative = sampling_logits(logits, config).double().softmax(-1).cumsum(-1)
    targets = draws.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
