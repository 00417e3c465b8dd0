"""Files of a corpus: which ones, their bytes, and what the documents in them are.

    paths and globs  →  files  →  pieces of bytes, decompressed  →  blocks (``document_formats.py``)  →  documents

Compression (gzip with all its members, zstandard with all its frames) is recognised by content.
"""

import glob
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, Protocol

import zstandard

from megatron_kd.errors import DataError

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 256 << 20
PIECE_BYTES = 1 << 20
_RAW_PIECE_BYTES = 64 << 10
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

FormatName = Literal["auto", "jsonl", "parquet", "text"]


@dataclass(frozen=True)
class DocumentFormat:
    """Where the documents are in a file; see the keys of ``tokenize_corpus``."""

    kind: FormatName = "auto"
    text_field: str = "text"
    domain_field: str | None = None
    response_field: str | None = None
    document_separator: str | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that holds no usable document, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class Documents:
    """The documents of one block, in order: lists of equal length; and the lines that were not usable."""

    path: str
    texts: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    responses: list[str] | None = None
    """What follows each text, where the texts are prompts."""


class LoadedBlock(Protocol):
    """Whole documents of one file, in memory; lines (or rows) of the file are counted from 1."""

    @property
    def path(self) -> str:
        """The file."""

    @property
    def first_line(self) -> int:
        """Number of its first line."""

    @property
    def num_lines(self) -> int:
        """Lines of the file that it covers."""

    @property
    def raw_bytes(self) -> int:
        """Bytes of the file (compressed, if it is) that were read for it; for progress."""

    def parse(self, form: DocumentFormat) -> Documents:
        """Return its documents. White space alone is neither a document nor a fault."""


class Block(Protocol):
    """Whole documents of one file, perhaps not read yet: what one worker handles at a time."""

    @property
    def size(self) -> int:
        """Bytes of the documents, about."""

    def load(self) -> LoadedBlock:
        """Read the documents, if that is still to do.

        Raises:
            DataError: a document is too long to hold.
        """


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Return the files that paths and globs name, each once, in the order given (a glob's matches sorted by name).

    Raises:
        DataError: a pattern matches nothing, or a path is not a readable file.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        matches = [match for match in matches if not os.path.isdir(match)] if len(matches) > 1 else matches
        if not matches:
            raise DataError(f"{pattern}: no such file, and no file matches it as a glob; check 'input'")
        for match in matches:
            if os.path.isdir(match):
                raise DataError(f"{match}: is a folder; give its files, for example '{match}/*.jsonl'")
            if not os.access(match, os.R_OK):
                raise DataError(f"{match}: cannot be read (permission); change its mode")
            files[match] = None
    return list(files)


def checked_text(text: Any, text_field: str) -> str:
    """Return ``text`` if it is a string that UTF-8 can hold.

    Raises:
        ValueError: it is not; says why.
    """
    if type(text) is not str:
        raise ValueError(f"field '{text_field}' is {type(text).__name__}, not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"a lone surrogate at character {error.start}, which UTF-8 cannot hold") from None
    return text


def compression_of(path: str) -> str | None:
    """Return ``gzip``, ``zstandard`` or None: by the file's magic, else its extension."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head == _ZSTD_MAGIC:
        return "zstandard"
    if head and path.endswith(".gz"):
        return "gzip"
    return "zstandard" if head and path.endswith((".zst", ".zstd")) else None


def read_pieces(path: str, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[bytes, int]]:
    """Yield the decompressed bytes of a file in pieces, each with the number of raw bytes read for it.

    Raises:
        DataError: a compressed file is truncated or damaged.
    """
    compression = compression_of(path)
    with open(path, "rb") as file:
        if compression == "gzip":
            yield from _decompress(path, file, _gzip_member, "gzip")
        elif compression == "zstandard":
            yield from _decompress(path, file, _zstd_frame, "zstandard")
        else:
            while piece := file.read(piece_bytes):
                yield piece, len(piece)


def read_line_range(path: str, start: int, stop: int, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[bytes, int]]:
    """Yield, in pieces, the lines of an uncompressed file that begin at byte ``start`` or later and before ``stop``."""
    with open(path, "rb") as file:
        place, end = _line_start(file, start), _line_start(file, stop)
        file.seek(place)
        while place < end and (piece := file.read(min(piece_bytes, end - place))):
            place += len(piece)
            yield piece, len(piece)


def lines_before(path: str, place: int) -> int:
    """Return how many lines of an uncompressed file begin before byte ``place``."""
    if place == 0:
        return 0
    count, left = 1, place - 1
    with open(path, "rb") as file:
        while left and (piece := file.read(min(PIECE_BYTES, left))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count


def _line_start(file: BinaryIO, place: int) -> int:
    """Return where the first line at ``place`` or later begins; the end of the file if none does."""
    if place == 0:
        return 0
    file.seek(place - 1)
    while piece := file.read(_RAW_PIECE_BYTES):
        found = piece.find(b"\n")
        if found >= 0:
            return file.tell() - len(piece) + found + 1
    return file.tell()


def _gzip_member() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstd_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _decompress(path: str, file: Any, new_stream: Any, name: str) -> Iterator[tuple[bytes, int]]:
    stream = None
    members = 0
    try:
        while raw := file.read(_RAW_PIECE_BYTES):
            size = len(raw)
            while raw:
                if stream is None:
                    if members and name == "gzip" and not (raw := raw.lstrip(b"\0")):
                        break  # zero padding after a member
                    stream = new_stream()
                piece = stream.decompress(raw)
                raw = b""
                if stream.eof:
                    raw, stream = stream.unused_data, None
                    members += 1
                yield piece, size
                size = 0
    except (zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged {name} data near byte {file.tell()} ({error}); copy it again") from None
    if stream is not None:
        raise DataError(f"{path}: truncated {name} file: its last frame does not end; copy it again")
