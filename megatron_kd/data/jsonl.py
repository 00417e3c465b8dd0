"""JSONL files, plain, gzip or zstandard: one JSON object a line.

    file  →  blocks of whole lines, a few MiB each  →  parse: texts, domains, faults

Both steps hold a bounded amount in memory, whatever the size of the corpus.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_kd.data.corpus_files import (
    BLOCK_BYTES,
    MAX_LINE_BYTES,
    PIECE_BYTES,
    BadLine,
    DocumentFormat,
    Documents,
    checked_text,
    read_line_range,
    read_pieces,
)
from megatron_kd.errors import DataError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file.

    Attributes:
        path: the file.
        first_line: number of the first line, from 1.
        data: the lines' bytes; all but possibly the file's last end with a newline.
        raw_bytes: how many bytes of the file (compressed, if it is) were read for this block; for progress.
        begins_file: whether line 1 is the file's first.
    """

    path: str
    first_line: int
    data: bytes
    raw_bytes: int
    begins_file: bool = True

    @property
    def num_lines(self) -> int:
        """Lines of the file that it covers."""
        return self.data.count(b"\n") + (not self.data.endswith(b"\n") and bool(self.data))

    @property
    def size(self) -> int:
        """Bytes of the lines."""
        return len(self.data)

    def load(self) -> "LineBlock":
        """Return the block itself."""
        return self

    def parse(self, form: DocumentFormat) -> Documents:
        """Parse the lines. Fields may be dotted, for nested objects; without a domain field every domain is ``""``."""
        text_field, domain_field, response_field = form.text_field, form.domain_field, form.response_field
        documents = Documents(self.path, responses=[] if response_field else None)
        is_plain = response_field is None and "." not in text_field + (domain_field or "")
        text_keys = text_field.split(".")
        domain_keys = domain_field.split(".") if domain_field else []
        data = self.data.removeprefix(_BOM) if self.first_line == 1 and self.begins_file else self.data
        for number, line in enumerate(data.split(b"\n"), start=self.first_line):
            if not line or line.isspace():
                continue
            try:
                row = _load(line)
                if is_plain and type(row) is dict:  # most lines of most corpora, without a call a field
                    text, domain = row.get(text_field), row.get(domain_field, "") if domain_field else ""
                    if type(text) is str and text.isascii() and type(domain) is str and (domain or not domain_field):
                        documents.texts.append(text)
                        documents.domains.append(domain)
                        documents.lines.append(number)
                        continue
                text = _text_of(row, text_keys, text_field)
                domain = _domain_of(row, domain_keys, domain_field) if domain_keys else ""
                response = _text_of(row, response_field.split("."), response_field) if response_field else ""
            except (ValueError, RecursionError) as error:
                documents.bad.append(BadLine(self.path, number, _reason(error, line)))
            else:
                documents.texts.append(text)
                documents.domains.append(domain)
                documents.lines.append(number)
                if documents.responses is not None:
                    documents.responses.append(response)
        return documents


@dataclass(frozen=True)
class RangeBlock:
    """The lines of a plain file that begin at byte ``start`` or later and before ``stop``; not read yet."""

    path: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes of the range."""
        return self.stop - self.start

    def load(self) -> LineBlock:
        """Read the lines.

        Raises:
            DataError: a line is longer than ``MAX_LINE_BYTES``.
        """
        pieces = [block.data for block in read_line_blocks(self.path, MAX_LINE_BYTES, self.start, self.stop)]
        return LineBlock(self.path, 1, b"".join(pieces), self.size, self.start == 0)


def read_line_blocks(
    path: str, block_bytes: int = BLOCK_BYTES, start: int = 0, stop: int | None = None
) -> Iterator[LineBlock]:
    """Cut a file into blocks of whole lines, about ``block_bytes`` each (more only if one line is longer).

    Args:
        path: the file.
        block_bytes: of decompressed lines.
        start, stop: only the lines of an uncompressed file that begin at byte ``start`` or later and before ``stop``;
            they are numbered from ``start`` on.

    Raises:
        DataError: a compressed file is truncated or damaged; a line is longer than ``MAX_LINE_BYTES``.
    """
    piece_bytes = min(block_bytes, PIECE_BYTES)
    pieces = read_pieces(path, piece_bytes) if stop is None else read_line_range(path, start, stop, piece_bytes)
    pending: list[bytes] = []
    pending_bytes = 0
    first_line = 1
    raw_bytes = 0
    for piece, raw in pieces:
        pending.append(piece)
        pending_bytes += len(piece)
        raw_bytes += raw
        if pending_bytes < block_bytes or b"\n" not in piece:
            if pending_bytes > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}: line {first_line} or one soon after it is longer than {MAX_LINE_BYTES >> 20} MiB; "
                    "is it one JSON object a line?"
                )
            continue
        data = b"".join(pending)
        cut = data.rfind(b"\n") + 1
        yield LineBlock(path, first_line, data[:cut], raw_bytes, start == 0)
        first_line += data.count(b"\n", 0, cut)
        pending, pending_bytes, raw_bytes = [data[cut:]], len(data) - cut, 0
    if pending_bytes:
        yield LineBlock(path, first_line, b"".join(pending), raw_bytes, start == 0)


def _reason(error: Exception, line: bytes) -> str:
    """Say why a line holds no document."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return str(error) or "nested too deeply"


def _load(line: bytes) -> Any:
    """Parse a JSON value; what the fast parser refuses, the other accepts, or says what is wrong with it."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line.decode("utf-8"))


def _text_of(row: Any, keys: list[str], text_field: str) -> str:
    if type(row) is not dict:
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    text = _lookup(row, keys)
    if text is None:
        raise ValueError(f"no field '{text_field}' (fields: {', '.join(list(row)[:8]) or 'none'})")
    return checked_text(text, text_field)


def _domain_of(row: Any, keys: list[str], domain_field: str | None) -> str:
    domain = _lookup(row, keys)
    if type(domain) is not str:
        raise ValueError(f"no field '{domain_field}' with a string, which domain_field names")
    return domain


def _lookup(row: Any, keys: list[str]) -> Any:
    for key in keys:
        if type(row) is not dict:
            return None
        row = row.get(key)
    return row
