"""Encoded documents on disk: what a task has encoded, so that it is never encoded twice and can be merged.

A part of the work store (``artefacts/work_store.py``) holds about 64 MiB of text and is called ``<unit>-<part>``,
``<unit>-<part>-last`` for a unit's last. It is a function of its unit alone, so it does not matter which task made it,
or how many tasks there were. Its payload: ids, lengths (int64), domain codes (int32), split hashes (uint64), prompt
lengths (int32), one after another; then a JSON footer and its length (uint32).
"""

import contextlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.data.corpus_files import BadLine

WORTH_KEEPING = 2
"""A run that fails keeps its parts only if it made at least this many."""
_FOOTER_SIZE = struct.Struct("<I")


@dataclass(frozen=True)
class EncodedBlock:
    """Consecutive documents of one file as ids, each ended by eos.

    Attributes:
        path: the file.
        unit_start: first byte of its unit.
        num_lines: lines (or rows) of the file that it covers.
        ids: ``[sum(lengths)]``.
        lengths: int64 ``[n]``.
        domains: n labels.
        split_hashes: uint64 ``[n]``, a function of the text and the split seed; empty without a seed.
        prompt_lengths: int32 ``[n]``, ids of each document's prompt; empty without prompts.
        bad: lines that hold no usable document, counted from 1 within this block.
        text_bytes, raw_bytes: UTF-8 bytes of text, and bytes read from the file.
    """

    path: str
    unit_start: int
    num_lines: int
    ids: np.ndarray
    lengths: np.ndarray
    domains: list[str]
    split_hashes: np.ndarray
    prompt_lengths: np.ndarray
    bad: list[BadLine]
    text_bytes: int
    raw_bytes: int


@dataclass(frozen=True)
class Unit:
    """What one task encodes: a file, or the lines of an uncompressed file that begin in a range of bytes."""

    number: int
    path: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FinishedParts:
    """Names of a unit's parts that are there, in order; ``is_complete`` if the last of them is the unit's last."""

    names: list[str]
    is_complete: bool


class EncodedParts:
    """The parts of one corpus.

    Args:
        store: of the corpus; its recipe says what the documents are and how they are encoded.
    """

    def __init__(self, store: WorkStore) -> None:
        self.store = store

    @contextlib.contextmanager
    def opened(self, shared: bool, keep: bool = False) -> Iterator["EncodedParts"]:
        """Claim the store; after a failure, remove it unless its parts are worth keeping.

        Args:
            shared: share it with other tasks, and never remove it.
            keep: remove it only if it has no part.

        Raises:
            DataError: see :meth:`WorkStore.claim`.
        """
        with self.store:
            self.store.claim(shared)
            try:
                yield self
            except BaseException:
                if not shared and len(list(self.store.folder.glob("*.part"))) < (1 if keep else WORTH_KEEPING):
                    self.store.remove()
                raise

    def finished(self, unit: Unit) -> FinishedParts:
        """Return a unit's parts that are on disk, from its first on; whether they are sound is not checked."""
        names: list[str] = []
        while True:
            last = name_of(unit, len(names), is_last=True)
            if self.store.path_of(last).is_file():
                return FinishedParts([*names, last], True)
            name = name_of(unit, len(names), is_last=False)
            if not self.store.path_of(name).is_file():
                return FinishedParts(names, False)
            names.append(name)

    def usable(self, unit: Unit) -> FinishedParts:
        """Return a unit's parts that can be used again; a damaged one and those after it are removed."""
        finished = self.finished(unit)
        for number, name in enumerate(finished.names):
            if not self.store.is_whole(name):
                for useless in finished.names[number:]:
                    self.store.path_of(useless).unlink(missing_ok=True)
                return FinishedParts(finished.names[:number], False)
        return finished

    def new_part(self, unit: Unit) -> "PartWriter":
        """Return a writer for a unit's next part."""
        return PartWriter(self.store, unit)

    def read(self, name: str) -> EncodedBlock:
        """Read a whole part as one block.

        Raises:
            DataError: it is missing or damaged.
        """
        data = self.store.read(name)
        size = int(data[-_FOOTER_SIZE.size :].view("<u4")[0])
        footer = _Footer(**json.loads(data[-_FOOTER_SIZE.size - size : -_FOOTER_SIZE.size].tobytes()))
        starts = np.cumsum([0, *footer.sizes]).tolist()
        ids, lengths, codes, hashes, prompts = (
            data[start:stop].copy().view(dtype) if start % 8 else data[start:stop].view(dtype)
            for start, stop, dtype in zip(
                starts[:-1], starts[1:], (footer.dtype or "<u2", "<i8", "<i4", "<u8", "<i4"), strict=True
            )
        )
        domains = [footer.domains[code] for code in codes.tolist()]
        bad = [BadLine(footer.path, line, reason) for line, reason in footer.bad]
        return EncodedBlock(
            footer.path, footer.unit_start, footer.num_lines, ids, lengths, domains, hashes, prompts, bad,
            footer.text_bytes, footer.raw_bytes,
        )  # fmt: skip


def name_of(unit: Unit, part: int, is_last: bool) -> str:
    """Return the name of a unit's part."""
    return f"{unit.number:06d}-{part:06d}{'-last' if is_last else ''}"


@dataclass
class _Footer:
    path: str
    unit_start: int
    dtype: str = ""
    num_lines: int = 0
    text_bytes: int = 0
    raw_bytes: int = 0
    domains: list[str] = field(default_factory=list)
    bad: list[list[Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


class PartWriter:
    """Collects the blocks of one part; ids go to the disk at once, the rest at :meth:`finish`."""

    def __init__(self, store: WorkStore, unit: Unit) -> None:
        self._unit = unit
        self._file = store.new_part()
        self._codes: dict[str, int] = {}
        self._arrays: list[list[np.ndarray]] = [[], [], [], []]
        self._footer = _Footer(unit.path, unit.start)
        self._id_bytes = 0

    def add(self, block: EncodedBlock) -> None:
        """Append a block."""
        footer = self._footer
        footer.dtype = block.ids.dtype.name
        self._file.write(block.ids)
        self._id_bytes += block.ids.nbytes
        codes = [self._codes.setdefault(domain, len(self._codes)) for domain in block.domains]
        for collected, array, dtype in zip(
            self._arrays,
            (block.lengths, codes, block.split_hashes, block.prompt_lengths),
            ("<i8", "<i4", "<u8", "<i4"),
            strict=True,
        ):
            collected.append(np.asarray(array, dtype=dtype))
        footer.bad += [[footer.num_lines + line.line, line.reason] for line in block.bad]
        footer.num_lines += block.num_lines
        footer.text_bytes += block.text_bytes
        footer.raw_bytes += block.raw_bytes

    def finish(self, part: int, is_last: bool) -> None:
        """Write what is left and give the part its name."""
        footer = self._footer
        footer.sizes = [self._id_bytes]
        for collected in self._arrays:
            whole = np.concatenate(collected) if collected else np.zeros(0, "<i4")
            footer.sizes.append(whole.nbytes)
            self._file.write(whole)
        footer.domains = list(self._codes)
        text = json.dumps(vars(footer)).encode()
        self._file.write(text + _FOOTER_SIZE.pack(len(text)))
        self._file.finish(name_of(self._unit, part, is_last))

    def abort(self) -> None:
        """Give up."""
        self._file.abort()
