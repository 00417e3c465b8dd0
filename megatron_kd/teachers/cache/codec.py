"""What is kept of a teacher's distributions over one chunk, and the record that holds it.

A record is about n positions, m of which are present (they count in the loss), with E ids in all:

    present    n bits
    counts     m integers, the ids of each position       (not where all positions have as many)
    tail mass  m uint16, logarithmic
    ids        E integers of id_bits
    columns    what else the codec keeps about every id

Sections follow one another and begin on a whole byte; ``bit_packing.py`` defines integers and logarithmic codes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np

from megatron_kd.errors import ConfigError, DataError
from megatron_kd.losses.types import SparseTargetKind
from megatron_kd.teachers.cache.bit_packing import LogQuantizer, pack, packed_bytes, unpack, width_for
from megatron_kd.teachers.cache.vocabulary_search import BlockedSoftmax
from megatron_kd.teachers.teacher_config import CODECS

LARGEST_VOCABULARY = 1 << 20
SMALLEST_LOG = -32 * math.log(2.0)
"""Logarithm of the smallest probability that is not 0 in a record."""
TAIL_CODE = LogQuantizer(16, SMALLEST_LOG)


@dataclass(frozen=True)
class Entries:
    """The ids that are kept of T tokens, token after token; E in all.

    Attributes:
        counts: int64 [T], ids of each token, at least one.
        ids: uint32 [E], distinct within a token.
        tail: float32 [T], the teacher's probability outside of the ids.
        columns: [E] each, what the codec keeps about every id, by name.
    """

    counts: np.ndarray
    ids: np.ndarray
    tail: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def part(self, start: int, stop: int, entries: slice) -> "Entries":
        """Return the tokens ``[start, stop)``, whose ids are those in ``entries``."""
        columns = {name: values[entries] for name, values in self.columns.items()}
        return Entries(self.counts[start:stop], self.ids[entries], self.tail[start:stop], columns)

    @classmethod
    def concatenate(cls, parts: Sequence["Entries"]) -> "Entries":
        """Join entries of one codec, one after another."""
        if len(parts) == 1:
            return parts[0]
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        counts, ids, tail = (np.concatenate([getattr(p, name) for p in parts]) for name in ("counts", "ids", "tail"))
        return cls(counts, ids, tail, columns)


@dataclass(frozen=True)
class DecodedChunk:
    """A record's content.

    Attributes:
        rows: int64 [m], the positions that are present.
        counts: int64 [m], ids of each.
        ids: uint16 or uint32 [E].
        weights: float32 [E], what the loss takes for each id.
        tail: float32 [m], the teacher's probability outside of the ids.
    """

    rows: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    tail: np.ndarray

    def pad_into(self, ids: np.ndarray, weights: np.ndarray, tail: np.ndarray) -> None:
        """Fill the present rows of ``ids`` int64 [>= n, K], ``weights`` float32 [>= n, K], ``tail`` float32 [>= n]."""
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
class Codec(ABC):
    """A rule that keeps a few ids of a distribution, and their encoding in a record.

    Attributes:
        name: its row in ``teacher_config.CODECS``.
        max_ids: the most ids that a position can have.
        vocab_size: ids of the teacher.
    """

    name: ClassVar[str]
    max_ids: int
    vocab_size: int

    @property
    @abstractmethod
    def target_kinds(self) -> tuple[SparseTargetKind, ...]:
        """The sparse targets that can be made of its records, the default one first."""

    @property
    def proposal_exponent(self) -> float:
        """Exponent of the teacher's probabilities from which ids are drawn, for codecs that draw."""
        return 1.0

    @property
    def fixed_count(self) -> int | None:
        """Ids of every position, where all have as many."""
        return None

    @abstractmethod
    def select(self, softmax: BlockedSoftmax, chunk_ids: np.ndarray, positions: np.ndarray) -> Entries:
        """Return what is kept of n tokens, the same on every rank of the vocabulary; may overwrite ``softmax``.

        Args:
            chunk_ids, positions: int64 [n], root chunk id and place in the chunk of each token.
        """

    @abstractmethod
    def weights(self, entries: Entries) -> np.ndarray:
        """Return what the loss takes for each id, float32 [E], not quantised."""

    @abstractmethod
    def encode_columns(self, entries: Entries) -> list[np.ndarray]:
        """Return the record's last sections, uint8 each."""

    @abstractmethod
    def decode_columns(self, reader: "RecordReader", counts: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """Read the record's last sections and return the weights, float32 [E]; may adjust ``tail`` [m] in place."""

    @abstractmethod
    def describe(self) -> str:
        """Describe what is kept, in one phrase."""

    @classmethod
    def build(cls, name: str, keys: object, vocab_size: int) -> "Codec":
        """Build the codec ``name`` from those of its keys that a configuration has; the others keep their defaults.

        Args:
            keys: a configuration object.
            vocab_size: ids of the teacher.
        """
        row = CODECS[name]
        values = {field: getattr(keys, key) for field, key in row.keys.items() if hasattr(keys, key)}
        return row.load()(vocab_size=vocab_size, **values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Codec":
        """Invert :meth:`to_mapping`.

        Raises:
            DataError: no such codec.
        """
        if values["name"] not in CODECS:
            raise DataError(f"codec '{values['name']}' is not known to this version, only {', '.join(CODECS)}")
        codec = CODECS[values["name"]].load()
        return codec(**{field.name: values[field.name] for field in fields(codec)})

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for a manifest; fields of other codecs have their neutral values."""
        own = {"name": self.name, **asdict(self)}
        return {"name": "", "max_ids": 0, "vocab_size": 0, "top_p": None, "proposal_exponent": 1.0, "seed": 0} | own

    def target_kind(self, sparse_target: str, where: str) -> SparseTargetKind:
        """Return the sparse target that ``distillation.sparse_target`` asks for.

        Args:
            where: what holds the records, for the message.

        Raises:
            ConfigError: it cannot be made of this codec's records.
        """
        if sparse_target == "auto":
            return self.target_kinds[0]
        for kind in self.target_kinds:
            if kind == sparse_target:
                return kind
        raise ConfigError(
            f"'distillation.sparse_target' {sparse_target} cannot be made of {where} (codec {self.name}): "
            f"choose {' or '.join(self.target_kinds)}"
        )

    @property
    def id_bits(self) -> int:
        """Width of an id."""
        return width_for(self.vocab_size - 1)

    @property
    def count_bits(self) -> int:
        """Width of a number of ids."""
        return width_for(self.max_ids)

    def encode(self, present: np.ndarray, entries: Entries) -> np.ndarray:
        """Return the record, uint8, of one chunk.

        Args:
            present: bool [n].
            entries: of the positions where ``present`` is true.
        """
        sections = [np.packbits(present, bitorder="little")]
        if self.fixed_count is None:
            sections.append(pack(entries.counts, self.count_bits))
        sections += [words(TAIL_CODE.encode(entries.tail)), pack(entries.ids, self.id_bits)]
        return np.concatenate([*sections, *self.encode_columns(entries)])

    def decode(self, record: np.ndarray, positions: int, num_entries: int) -> DecodedChunk:
        """Invert :meth:`encode`.

        Args:
            positions: n.
            num_entries: E.

        Raises:
            DataError: the record's length does not fit its content.
        """
        reader = RecordReader(record)
        present = np.unpackbits(reader.take(-(-positions // 8)), count=positions, bitorder="little")
        rows = np.flatnonzero(present)
        if self.fixed_count is None:
            counts = reader.integers(len(rows), self.count_bits).astype(np.int64)
        else:
            counts = np.full(len(rows), self.fixed_count, dtype=np.int64)
        if int(counts.sum()) != num_entries:
            raise DataError(f"a record holds {int(counts.sum())} ids where its index states {num_entries}")
        tail = TAIL_CODE.decode(reader.words(len(rows)))
        ids = reader.integers(num_entries, self.id_bits)
        weights = self.decode_columns(reader, counts, tail)
        if reader.left:
            raise DataError(f"a record has {reader.left} bytes more than its {num_entries} ids need")
        return DecodedChunk(rows, counts, ids, weights, tail)


class RecordReader:
    """Takes a record apart from its front.

    Raises:
        DataError: a section ends behind the record, on any call.
    """

    def __init__(self, record: np.ndarray) -> None:
        self._record, self._at = record, 0

    @property
    def left(self) -> int:
        """Bytes that are not taken yet."""
        return len(self._record) - self._at

    def take(self, size: int) -> np.ndarray:
        """Return the next ``size`` bytes."""
        if size > self.left:
            raise DataError(f"a record of {len(self._record)} bytes ends before its {self._at + size} bytes")
        self._at += size
        return self._record[self._at - size : self._at]

    def words(self, count: int) -> np.ndarray:
        """Return the next ``count`` uint16."""
        return np.frombuffer(self.take(2 * count), dtype="<u2")

    def integers(self, count: int, width: int) -> np.ndarray:
        """Return the next ``count`` packed integers of ``width`` bits."""
        return unpack(self.take(packed_bytes(count, width)), count, width)


def words(values: np.ndarray) -> np.ndarray:
    """Return uint16 values as bytes, little-endian."""
    return values.astype("<u2").view(np.uint8)


def ranks(counts: np.ndarray) -> np.ndarray:
    """Return the place of every id within its position, int64 [E]."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) - np.repeat(starts, counts)
