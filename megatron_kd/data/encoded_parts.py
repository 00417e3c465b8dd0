"""Encoded documents on disk: what a task has done, so that it is never done twice and can be merged.

``<output>.parts/`` holds ``parts.json`` (which corpus, tokenizer and fields) and one file a part, about 64 MiB of text:
``<unit>-<part>.part``, ``.last.part`` for a unit's last. A part is a function of its unit alone, so it does not matter
which task made it, or how many tasks there were. A part's file: ids, lengths (int64), domain codes (int32), split
hashes (uint64), prompt lengths (int32), one after another; then a JSON footer, its length (uint32) and the CRC-32 of
everything before.
"""

import contextlib
import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import fsync_folder, write_file
from megatron_kd.artefacts.folder_lock import lock_folder
from megatron_kd.data.documents import BadLine
from megatron_kd.errors import DataError

INFO_NAME = "parts.json"
WORTH_KEEPING = 2
"""A run that fails keeps its parts only if it has made this many."""
_TAIL = struct.Struct("<II")


@dataclass(frozen=True)
class EncodedBlock:
    """Consecutive documents of one file as ids, each ended by eos.

    Attributes:
        path: the file.
        unit_start: first byte of the unit that it belongs to.
        num_lines: lines (or rows) of the file that it covers.
        ids: ``[sum(lengths)]``.
        lengths: int64 ``[n]``.
        domains: n labels.
        split_hashes: uint64 ``[n]``, a function of the text and the split seed; empty without one.
        prompt_lengths: int32 ``[n]``, how many ids of each document are its prompt; empty where there are no prompts.
        bad: lines that hold no usable document, counted from 1 inside this block.
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
    """What one task encodes: a file, or the lines that begin in a range of bytes of an uncompressed one."""

    number: int
    path: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FinishedParts:
    """The parts of a unit that are there, in order; ``is_complete`` if the last of them is the unit's last."""

    paths: list[Path]
    is_complete: bool


class PartFolder:
    """The parts of one corpus.

    Args:
        folder: ``<output>.parts``.
        info: what identifies the corpus and how it is encoded; JSON values.
    """

    def __init__(self, folder: Path, info: Mapping[str, Any]) -> None:
        self.folder = folder
        self.info = dict(info)

    @contextlib.contextmanager
    def opened(self, shared: bool, keep: bool = False) -> Iterator["PartFolder"]:
        """Hold the folder, with other tasks if ``shared``.

        Parts of another corpus are removed; refused if ``shared`` or ``keep``, which removes no part in any case.

        Raises:
            DataError: somebody else holds it, or it cannot be made; it belongs to another corpus.
        """
        with lock_folder(self.folder, "there", shared):
            try:
                self._claim(shared or keep)
                yield self
            except BaseException as error:
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = str(self.folder)  # a failed write does not say where
                if not shared and len(list(self.folder.glob("*.part"))) < (1 if keep else WORTH_KEEPING):
                    self.remove()
                raise

    def _claim(self, refuse: bool) -> None:
        found = self._read_info()
        if found is not None and found != self.info and (refuse or self._holds_parts()):
            if refuse:
                raise DataError(
                    f"{self.folder}: holds parts of another corpus, tokenizer or setting ({self._differences(found)}): "
                    "give the same, or remove it, or choose another output"
                )
            for path in self.folder.glob("*.part"):
                path.unlink()
        if found != self.info:
            write_file(self.folder / INFO_NAME, json.dumps(self.info, indent=1) + "\n")

    def _read_info(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / INFO_NAME).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _differences(self, found: Mapping[str, Any]) -> str:
        names = sorted(set(found) | set(self.info))
        return "; ".join(
            f"{name} {found.get(name)} there, {self.info.get(name)} now"
            for name in names
            if found.get(name) != self.info.get(name)
        )

    def _holds_parts(self) -> bool:
        return any(self.folder.glob("*.part"))

    def remove(self) -> None:
        """Remove the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self, unit: Unit) -> FinishedParts:
        """The parts of a unit that are whole on disk, from its first on."""
        paths: list[Path] = []
        while True:
            last = self.path_of(unit, len(paths), is_last=True)
            if last.is_file():
                return FinishedParts([*paths, last], True)
            path = self.path_of(unit, len(paths), is_last=False)
            if not path.is_file():
                return FinishedParts(paths, False)
            paths.append(path)

    def new_part(self, unit: Unit) -> "PartWriter":
        """A writer for a unit's next part."""
        return PartWriter(self, unit)

    def path_of(self, unit: Unit, part: int, is_last: bool) -> Path:
        """The name of a unit's part."""
        return self.folder / f"{unit.number:06d}-{part:06d}{'.last' if is_last else ''}.part"


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
    """Collects the blocks of one part; ids go to the disk at once, the rest at :meth:`close`."""

    def __init__(self, folder: PartFolder, unit: Unit) -> None:
        self._folder, self._unit = folder, unit
        self._temporary = folder.folder / f"part.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        self._file = open(self._temporary, "wb")
        self._crc = 0
        self._codes: dict[str, int] = {}
        self._arrays: list[list[np.ndarray]] = [[], [], [], []]
        self._footer = _Footer(unit.path, unit.start)
        self._id_bytes = 0

    def add(self, block: EncodedBlock) -> None:
        """Append a block."""
        footer = self._footer
        footer.dtype = block.ids.dtype.name
        self._put(block.ids)
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

    def _put(self, data: bytes | np.ndarray) -> None:
        if len(data):
            view = memoryview(data).cast("B")
            self._file.write(view)
            self._crc = zlib.crc32(view, self._crc)

    def close(self, part: int, is_last: bool) -> None:
        """Finish the file and give it its name."""
        footer = self._footer
        footer.sizes = [self._id_bytes]
        for collected in self._arrays:
            whole = np.concatenate(collected) if collected else np.zeros(0, "<i4")
            footer.sizes.append(whole.nbytes)
            self._put(whole)
        footer.domains = list(self._codes)
        text = json.dumps(vars(footer)).encode()
        self._put(text)
        with self._file as file:
            self._put(struct.pack("<I", len(text)))
            file.write(struct.pack("<I", self._crc))
            file.flush()
            os.fsync(file.fileno())
        os.rename(self._temporary, self._folder.path_of(self._unit, part, is_last))
        fsync_folder(self._folder.folder)

    def abort(self) -> None:
        """Give up."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_part(path: Path) -> EncodedBlock:
    """A whole part.

    Raises:
        DataError: it is damaged.
    """
    data = np.fromfile(path, dtype=np.uint8)
    damaged = DataError(f"{path}: damaged part; remove it and run the tool (or its task) again")
    if len(data) < _TAIL.size or zlib.crc32(data[:-4]) != int(data[-4:].view("<u4")[0]):
        raise damaged
    size = int(data[-8:-4].view("<u4")[0])
    footer = _Footer(**json.loads(data[-8 - size : -8].tobytes()))
    starts = np.cumsum([0, *footer.sizes]).tolist()
    pieces = [data[start:stop] for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    ids, lengths, codes, hashes, prompts = (
        piece.copy().view(dtype) if start % 8 else piece.view(dtype)
        for piece, start, dtype in zip(
            pieces, starts[:-1], (footer.dtype or "<u2", "<i8", "<i4", "<u8", "<i4"), strict=True
        )
    )
    domains = [footer.domains[code] for code in codes.tolist()]
    bad = [BadLine(footer.path, line, reason) for line, reason in footer.bad]
    return EncodedBlock(
        footer.path, footer.unit_start, footer.num_lines, ids, lengths, domains, hashes, prompts, bad,
        footer.text_bytes, footer.raw_bytes,
    )  # fmt: skip
