"""What a teacher says about the positions of one chunk, as bytes and back.

A record holds n positions, m of which carry knowledge (those that count in the loss), with E ids in all:

    present    n bits
    counts     m fields, ids of each position             (not for top_k: the same everywhere)
    tail mass  m uint16, logarithmic
    ids        E fields of id_bits
    top_k, top_p: probabilities in falling order: the first 8 of a position as uint16, logarithmic; the others in 11
                  bits, logarithmic and relative to the 8th
    sampled:      how often each id was drawn, E fields; importance weights, E uint16, logarithmic (weighted draws only)

Sections follow one another and begin on a whole byte. Fields: ``bit_fields.py``; logarithmic codes: ``log_code.py``. A
decoded position's probabilities and tail mass are scaled, together, so that they make 1, as the teacher's do.

Positive numbers as integers on a logarithmic scale: a constant relative error, and an exact zero.
"""

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Mapping

import numpy as np

from megatron_kd.errors import DataError
from megatron_kd.teachers.cache.bit_packing import pack, packed_bytes, unpack, width_for


@dataclass(frozen=True)
class LogCode:
    """Codes of ``bits`` bits for 0 and for the numbers from ``exp(lowest)`` to ``exp(highest)``.

    Code 0 is zero, code c is ``exp(lowest + (c - 1) * step)``; what lies outside is moved to the nearer end. The
    relative error is at most ``step / 2``.
    """

    bits: int
    lowest: float
    highest: float = 0.0

    @property
    def step(self) -> float:
        """Between the logarithms of neighbouring codes."""
        return (self.highest - self.lowest) / ((1 << self.bits) - 2)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """uint16 codes of float32 ``values`` >= 0, same shape."""
        values = np.asarray(values, dtype=np.float32)
        with np.errstate(divide="ignore"):
            scaled = np.log(values)
        scaled -= np.float32(self.lowest)
        scaled *= np.float32(1.0 / self.step)
        scaled += np.float32(1.5)
        np.clip(scaled, 1, (1 << self.bits) - 1, out=scaled)
        codes = scaled.astype(np.uint16)
        codes[values == 0] = 0
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """float32 values of ``codes``, same shape."""
        return self._table.take(codes)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        codes = np.arange(1 << self.bits, dtype=np.float64)
        table = np.exp(self.lowest + (codes - 1) * self.step).astype(np.float32)
        table[0] = 0.0
        return table


CodecName = Literal["top_k", "top_p", "sampled"]
HEAD_IDS = 8
LARGEST_VOCABULARY = 1 << 20
_SMALLEST = -32 * math.log(2.0)
HEAD_CODE = LogCode(16, _SMALLEST)
REST_CODE = LogCode(11, -16.0)
TAIL_CODE = LogCode(16, _SMALLEST)
IMPORTANCE_CODE = LogCode(16, _SMALLEST, -_SMALLEST)


@dataclass(frozen=True)
class Entries:
    """The ids that are kept of T positions, position after position; E in all.

    Attributes:
        counts: int64 [T], ids of each position, at least one.
        ids: uint32 [E], distinct within a position.
        probabilities: float32 [E], falling within a position (``top_k``, ``top_p``).
        draws: uint16 [E], how often each id was drawn (``sampled``).
        importance: float32 [E], teacher's over proposal's probability (``sampled`` from another proposal).
        tail: float32 [T], the teacher's probability outside of the ids.
    """

    counts: np.ndarray
    ids: np.ndarray
    tail: np.ndarray
    probabilities: np.ndarray | None = None
    draws: np.ndarray | None = None
    importance: np.ndarray | None = None

    def part(self, start: int, stop: int, entries: slice) -> "Entries":
        """Positions ``[start, stop)``, whose ids are those in ``entries``."""
        parts = {
            name: None if value is None else value[entries]
            for name, value in vars(self).items()
            if name not in ("counts", "tail")
        }
        return Entries(counts=self.counts[start:stop], tail=self.tail[start:stop], **parts)


@dataclass(frozen=True)
class DecodedChunk:
    """One record: ``rows`` int64 [m], the positions with knowledge; the rest in their order.

    ``counts`` int64 [m], ``ids`` uint16 or uint32 [E], ``weights`` float32 [E], ``tail`` float32 [m].
    """

    rows: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    tail: np.ndarray

    def pad_into(self, ids: np.ndarray, weights: np.ndarray, tail: np.ndarray) -> None:
        """Fill the rows of ``ids`` int64 [>= n, K], ``weights`` float32 [>= n, K] and ``tail`` float32 [>= n]."""
        if not len(self.rows):
            return
        whole = len(self.rows) == self.rows[-1] + 1
        rows: Any = slice(0, len(self.rows)) if whole else self.rows
        width = int(self.counts.max())
        tail[rows] = self.tail
        if len(self.ids) == width * len(self.rows):
            ids[rows, :width] = self.ids.reshape(-1, width)
            weights[rows, :width] = self.weights.reshape(-1, width)
            return
        places, columns = np.repeat(self.rows, self.counts), ranks(self.counts)
        ids[places, columns] = self.ids
        weights[places, columns] = self.weights


@dataclass(frozen=True)
class Codec:
    """How the knowledge about a position is chosen and written.

    Attributes:
        name: ``top_k``: the largest ``max_ids``; ``top_p``: the fewest of the largest that hold ``top_p``, at most
            ``max_ids``; ``sampled``: ``max_ids`` draws with replacement, kept as counts.
        max_ids: see above; the most ids that a position can have.
        vocab_size: ids of the teacher.
        top_p: probability to be held, for ``top_p``.
        proposal_exponent: ids are drawn from teacher ** this, normalised; other than 1 gives weighted draws.
        seed: of the draws.
    """

    name: CodecName
    max_ids: int
    vocab_size: int
    top_p: float | None = None
    proposal_exponent: float = 1.0
    seed: int = 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Codec":
        """From what :meth:`to_mapping` gave."""
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)

    @property
    def id_bits(self) -> int:
        """Width of an id."""
        return width_for(self.vocab_size - 1)

    @property
    def is_weighted(self) -> bool:
        """Whether draws have importance weights."""
        return self.name == "sampled" and self.proposal_exponent != 1.0

    @property
    def fixed_count(self) -> int | None:
        """Ids of every position, where all have as many."""
        return min(self.max_ids, self.vocab_size) if self.name == "top_k" else None

    def encode(self, present: np.ndarray, entries: Entries) -> np.ndarray:
        """The record, uint8, of one chunk: ``present`` bool [n], ``entries`` of the positions where it is true."""
        sections = [np.packbits(present, bitorder="little")]
        if self.fixed_count is None:
            sections.append(pack(entries.counts, self._count_bits))
        sections.append(TAIL_CODE.encode(entries.tail).astype("<u2").view(np.uint8))
        sections.append(pack(entries.ids, self.id_bits))
        if self.name == "sampled":
            sections.append(pack(entries.draws, self._count_bits))
            if self.is_weighted:
                sections.append(IMPORTANCE_CODE.encode(entries.importance).astype("<u2").view(np.uint8))
        else:
            sections += self._encode_probabilities(entries)
        return np.concatenate(sections)

    def decode(self, record: np.ndarray, positions: int, num_entries: int) -> DecodedChunk:
        """The inverse of :meth:`encode`; ``num_entries`` is E.

        Raises:
            DataError: the record's length does not fit what it holds.
        """
        reader = _Sections(record)
        present = np.unpackbits(reader.take(-(-positions // 8)), count=positions, bitorder="little")
        rows = np.flatnonzero(present)
        counts = self._decode_counts(reader, len(rows))
        if int(counts.sum()) != num_entries:
            raise DataError(f"a record holds {int(counts.sum())} ids where its index states {num_entries}")
        tail = TAIL_CODE.decode(reader.words(len(rows)))
        ids = unpack(reader.take(packed_bytes(num_entries, self.id_bits)), num_entries, self.id_bits)
        if self.name == "sampled":
            weights = self._decode_draws(reader, num_entries)
        else:
            weights = self._decode_probabilities(reader, counts, num_entries)
            _scale(weights, tail, counts, self.fixed_count)
        if reader.left:
            raise DataError(f"a record has {reader.left} bytes more than its {num_entries} ids need")
        return DecodedChunk(rows, counts, ids, weights, tail)

    @property
    def _count_bits(self) -> int:
        return width_for(self.max_ids)

    def _decode_counts(self, reader: "_Sections", rows: int) -> np.ndarray:
        if self.fixed_count is not None:
            return np.full(rows, self.fixed_count, dtype=np.int64)
        return unpack(reader.take(packed_bytes(rows, self._count_bits)), rows, self._count_bits).astype(np.int64)

    def _encode_probabilities(self, entries: Entries) -> list[np.ndarray]:
        values, in_head = entries.probabilities, ranks(entries.counts) < HEAD_IDS
        head = HEAD_CODE.encode(values[in_head])
        anchors = np.repeat(_anchors(HEAD_CODE.decode(head), entries.counts), np.maximum(entries.counts - HEAD_IDS, 0))
        relative = np.divide(values[~in_head], anchors, out=np.zeros_like(anchors), where=anchors > 0)
        return [head.astype("<u2").view(np.uint8), pack(REST_CODE.encode(relative), REST_CODE.bits)]

    def _decode_probabilities(self, reader: "_Sections", counts: np.ndarray, num_entries: int) -> np.ndarray:
        in_rest = np.maximum(counts - HEAD_IDS, 0)
        num_rest = int(in_rest.sum())
        head = HEAD_CODE.decode(reader.words(num_entries - num_rest))
        rest = REST_CODE.decode(unpack(reader.take(packed_bytes(num_rest, REST_CODE.bits)), num_rest, REST_CODE.bits))
        if not num_rest:
            return head
        anchors = _anchors(head, counts)
        if self.fixed_count is not None:
            width = self.fixed_count - HEAD_IDS
            weights = np.empty((len(counts), self.fixed_count), dtype=np.float32)
            weights[:, :HEAD_IDS] = head.reshape(-1, HEAD_IDS)
            np.multiply(rest.reshape(-1, width), anchors[:, None], out=weights[:, HEAD_IDS:])
            return weights.reshape(-1)
        weights, in_head = np.empty(num_entries, dtype=np.float32), ranks(counts) < HEAD_IDS
        weights[in_head] = head
        weights[~in_head] = rest * np.repeat(anchors, in_rest)
        return weights

    def _decode_draws(self, reader: "_Sections", num_entries: int) -> np.ndarray:
        draws = unpack(reader.take(packed_bytes(num_entries, self._count_bits)), num_entries, self._count_bits)
        weights = np.multiply(draws, np.float32(1.0 / self.max_ids), dtype=np.float32)
        if self.is_weighted:
            weights *= IMPORTANCE_CODE.decode(reader.words(num_entries))
        return weights


def ranks(counts: np.ndarray) -> np.ndarray:
    """The place of every id within its position, int64 [E]."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) - np.repeat(starts, counts)


def _anchors(head: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float32 [m], the smallest probability in the head of each position."""
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


class _Sections:
    """Takes a record apart from its front."""

    def __init__(self, record: np.ndarray) -> None:
        self._record, self._at = record, 0

    @property
    def left(self) -> int:
        return len(self._record) - self._at

    def take(self, size: int) -> np.ndarray:
        if size > self.left:
            raise DataError(f"a record of {len(self._record)} bytes ends before its {self._at + size} bytes")
        self._at += size
        return self._record[self._at - size : self._at]

    def words(self, count: int) -> np.ndarray:
        return np.frombuffer(self.take(2 * count), dtype="<u2")
