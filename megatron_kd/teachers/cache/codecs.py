"""The codecs: the most probable ids of a token (``top_k``, ``top_p``), or ids that are drawn from it (``sampled``)."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_kd.losses.types import SparseTargetKind
from megatron_kd.teachers.cache.bit_packing import LogQuantizer, pack
from megatron_kd.teachers.cache.codec import SMALLEST_LOG, Codec, Entries, RecordReader, ranks, words
from megatron_kd.teachers.cache.vocabulary_search import BlockedSoftmax, uniform_numbers

HEAD_IDS = 8
HEAD_CODE = LogQuantizer(16, SMALLEST_LOG)
REST_CODE = LogQuantizer(11, -16.0)
IMPORTANCE_CODE = LogQuantizer(16, SMALLEST_LOG, -SMALLEST_LOG)


@dataclass(frozen=True)
class MostProbableCodec(Codec):
    """Keeps a token's most probable ids, with their probabilities.

    A record holds the probabilities in falling order: the first 8 of a position in 16 bits, the others in 11 bits
    relative to the 8th, all logarithmic. Decoded probabilities and tail mass are scaled, together, to a sum of 1.
    """

    @abstractmethod
    def num_kept(self, probabilities: Tensor) -> Tensor:
        """Return how many of the falling ``probabilities`` fp64 [n, K] are kept, int64 [n]."""

    @property
    def target_kinds(self) -> tuple[SparseTargetKind, ...]:
        """See :class:`Codec`."""
        return ("ghost", "renormalised")

    def select(self, softmax: BlockedSoftmax, chunk_ids: np.ndarray, positions: np.ndarray) -> Entries:
        """See :class:`Codec`; the column ``probabilities`` is float32, falling within a token."""
        count = min(self.max_ids, self.vocab_size)
        probabilities, ids = softmax.top_k(count)
        tail = softmax.take_mass_outside(ids)
        counts = self.num_kept(probabilities)
        kept = torch.arange(count, device=tail.device) < counts.unsqueeze(1)
        tail += torch.where(kept, 0.0, probabilities).sum(-1)
        return Entries(
            counts=counts.cpu().numpy(),
            ids=ids[kept].cpu().numpy().astype(np.uint32),
            tail=tail.float().cpu().numpy(),
            columns={"probabilities": probabilities[kept].float().cpu().numpy()},
        )

    def weights(self, entries: Entries) -> np.ndarray:
        """See :class:`Codec`."""
        return entries.columns["probabilities"]

    def encode_columns(self, entries: Entries) -> list[np.ndarray]:
        """See :class:`Codec`."""
        values, in_head = entries.columns["probabilities"], ranks(entries.counts) < HEAD_IDS
        head = HEAD_CODE.encode(values[in_head])
        anchors = np.repeat(_anchors(HEAD_CODE.decode(head), entries.counts), np.maximum(entries.counts - HEAD_IDS, 0))
        relative = np.divide(values[~in_head], anchors, out=np.zeros_like(anchors), where=anchors > 0)
        return [words(head), pack(REST_CODE.encode(relative), REST_CODE.bits)]

    def decode_columns(self, reader: RecordReader, counts: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """See :class:`Codec`."""
        weights = self._decode_probabilities(reader, counts)
        _scale(weights, tail, counts, self.fixed_count)
        return weights

    def _decode_probabilities(self, reader: RecordReader, counts: np.ndarray) -> np.ndarray:
        in_rest = np.maximum(counts - HEAD_IDS, 0)
        num_entries, num_rest = int(counts.sum()), int(in_rest.sum())
        head = HEAD_CODE.decode(reader.words(num_entries - num_rest))
        rest = REST_CODE.decode(reader.integers(num_rest, REST_CODE.bits))
        if not num_rest:
            return head
        anchors = _anchors(head, counts)
        if self.fixed_count is not None:
            width = self.fixed_count - HEAD_IDS
            rows = np.empty((len(counts), self.fixed_count), dtype=np.float32)
            rows[:, :HEAD_IDS] = head.reshape(-1, HEAD_IDS)
            np.multiply(rest.reshape(-1, width), anchors[:, None], out=rows[:, HEAD_IDS:])
            return rows.reshape(-1)
        weights, in_head = np.empty(num_entries, dtype=np.float32), ranks(counts) < HEAD_IDS
        weights[in_head] = head
        weights[~in_head] = rest * np.repeat(anchors, in_rest)
        return weights


@dataclass(frozen=True)
class TopKCodec(MostProbableCodec):
    """Keeps the ``max_ids`` most probable ids."""

    name: ClassVar[str] = "top_k"

    @property
    def fixed_count(self) -> int:
        """See :class:`Codec`."""
        return min(self.max_ids, self.vocab_size)

    def num_kept(self, probabilities: Tensor) -> Tensor:
        """Return K for each token."""
        return torch.full_like(probabilities[:, 0], probabilities.shape[1], dtype=torch.long)

    def describe(self) -> str:
        """See :class:`Codec`."""
        return f"top_k, the {self.max_ids} most probable ids per token"


@dataclass(frozen=True)
class TopPCodec(MostProbableCodec):
    """Keeps the fewest of the most probable ids that hold the probability ``top_p``, at most ``max_ids``."""

    name: ClassVar[str] = "top_p"
    top_p: float

    def num_kept(self, probabilities: Tensor) -> Tensor:
        """Return the number of ids that hold ``top_p``, at least 1 and at most K."""
        held = probabilities.cumsum(-1)
        return (held < self.top_p).sum(-1).add_(1).clamp_max_(probabilities.shape[1])

    def describe(self) -> str:
        """See :class:`Codec`."""
        return f"top_p, the most probable ids that hold {self.top_p}, at most {self.max_ids} per token"


@dataclass(frozen=True)
class SampledCodec(Codec):
    """Draws ``max_ids`` ids with replacement and keeps how often each was drawn (Sparse Logit Sampling, arXiv
    2503.16870).

    Ids are drawn from probability ** ``proposal_exponent``, normalised; other than 1 gives importance weights. A record
    holds the counts as integers and the importance weights in 16 bits, logarithmic. A decoded weight is an id's share
    of the draws times its importance.
    """

    name: ClassVar[str] = "sampled"
    proposal_exponent: float = 1.0
    seed: int = 0

    @property
    def is_weighted(self) -> bool:
        """Whether draws have importance weights."""
        return self.proposal_exponent != 1.0

    @property
    def target_kinds(self) -> tuple[SparseTargetKind, ...]:
        """See :class:`Codec`."""
        return ("weighted",) if self.is_weighted else ("sampled",)

    def select(self, softmax: BlockedSoftmax, chunk_ids: np.ndarray, positions: np.ndarray) -> Entries:
        """See :class:`Codec`; the columns are ``draws``, uint16, and for weighted draws ``importance``, float32."""
        numbers = uniform_numbers(self.seed, chunk_ids, positions, self.max_ids)
        ids, total = softmax.sample(torch.from_numpy(numbers).to(softmax.peak.device))
        ids = ids.sort(-1).values
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(first.reshape(-1).cpu().numpy())
        columns = {"draws": np.diff(starts, append=first.numel()).astype(np.uint16)}
        if self.is_weighted:  # p / (p^e / total)
            ratio = softmax.probabilities_of(ids).pow(1.0 - self.proposal_exponent) * total.unsqueeze(1)
            columns["importance"] = ratio[first].float().cpu().numpy()
        return Entries(
            counts=first.sum(-1).cpu().numpy(),
            ids=ids[first].cpu().numpy().astype(np.uint32),
            tail=softmax.take_mass_outside(ids).float().cpu().numpy(),
            columns=columns,
        )

    def weights(self, entries: Entries) -> np.ndarray:
        """See :class:`Codec`."""
        shares = (entries.columns["draws"] / np.float32(self.max_ids)).astype(np.float32)
        return shares * entries.columns["importance"] if self.is_weighted else shares

    def encode_columns(self, entries: Entries) -> list[np.ndarray]:
        """See :class:`Codec`."""
        sections = [pack(entries.columns["draws"], self.count_bits)]
        if self.is_weighted:
            sections.append(words(IMPORTANCE_CODE.encode(entries.columns["importance"])))
        return sections

    def decode_columns(self, reader: RecordReader, counts: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """See :class:`Codec`."""
        num_entries = int(counts.sum())
        draws = reader.integers(num_entries, self.count_bits)
        weights = np.multiply(draws, np.float32(1.0 / self.max_ids), dtype=np.float32)
        if self.is_weighted:
            weights *= IMPORTANCE_CODE.decode(reader.words(num_entries))
        return weights

    def describe(self) -> str:
        """See :class:`Codec`."""
        drawn = f"sampled, {self.max_ids} draws per token (seed {self.seed})"
        return f"{drawn} from the teacher to the power of {self.proposal_exponent}" if self.is_weighted else drawn


def _anchors(head: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the smallest probability in the head of each position, float32 [m]."""
    return head[np.cumsum(np.minimum(counts, HEAD_IDS)) - 1]


def _scale(weights: np.ndarray, tail: np.ndarray, counts: np.ndarray, fixed: int | None) -> None:
    """Make the weights [E] and the tail [m] of each position add up to 1, in place."""
    if not len(counts):
        return
    if fixed is not None:
        rows = weights.reshape(-1, fixed)
        factors = 1.0 / (np.einsum("mk->m", rows) + tail)
        rows *= factors[:, None]
    else:
        factors = 1.0 / (np.add.reduceat(weights, np.cumsum(counts) - counts) + tail)
        weights *= np.repeat(factors, counts)
    tail *= factors
