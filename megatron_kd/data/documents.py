"""Documents from JSONL files: plain, gzip or zstandard, one JSON object a line; ``document_format.py`` has the rest.

    files and globs  →  read_blocks: whole lines in blocks of a few MiB  →  parse_block: texts, domains, faults

Both steps hold a bounded amount in memory whatever the size of the corpus. A block is what one worker process handles.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_kd.data.byte_pieces import PIECE_BYTES, read_line_range, read_pieces
from megatron_kd.errors import DataError

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 256 << 20
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
    """The documents of one block, in order; lists of the same length, and the lines that were not usable."""

    path: str
    texts: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    responses: list[str] | None = None
    """What follows each text, where that is a prompt."""


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files named by paths and globs, each once, in the order given (a glob's matches sorted by name).

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
                raise DataError(f"{match}: cannot be read (permission)")
            files[match] = None
    return list(files)


def read_blocks(
    path: str, block_bytes: int = BLOCK_BYTES, start: int = 0, stop: int | None = None
) -> Iterator[LineBlock]:
    """Cut a file into blocks of whole lines, about ``block_bytes`` each (more only if one line is longer).

    Args:
        path: the file.
        block_bytes: of decompressed lines.
        start, stop: of an uncompressed file, only the lines that begin at byte ``start`` or later and before ``stop``;
            their numbers count from ``start``.

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


def parse_block(
    block: LineBlock, text_field: str = "text", domain_field: str | None = None, response_field: str | None = None
) -> Documents:
    """Parse the lines of a block. Lines of white space alone hold no document and are no fault.

    Args:
        block: from :func:`read_blocks`.
        text_field: key of the text, dotted for nested objects.
        domain_field: key of the domain label, dotted; None gives every document the domain ``""``.
        response_field: key of what follows the text, where the text is a prompt, dotted.
    """
    documents = Documents(block.path, responses=[] if response_field else None)
    is_plain = response_field is None and "." not in text_field + (domain_field or "")
    text_keys = text_field.split(".")
    domain_keys = domain_field.split(".") if domain_field else []
    data = block.data.removeprefix(_BOM) if block.first_line == 1 and block.begins_file else block.data
    for number, line in enumerate(data.split(b"\n"), start=block.first_line):
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
            documents.bad.append(BadLine(block.path, number, _reason(error, line)))
        else:
            documents.texts.append(text)
            documents.domains.append(domain)
            documents.lines.append(number)
            if documents.responses is not None:
                documents.responses.append(response)
    return documents


def _reason(error: Exception, line: bytes) -> str:
    """Why a line holds no document."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return str(error) or "nested too deeply"


def read_documents(
    patterns: Sequence[str], text_field: str = "text", domain_field: str | None = None
) -> Iterator[tuple[str, str, int]]:
    """(text, path, line number) of every document; any unusable line is an error.

    Raises:
        DataError: see :func:`expand_inputs`, :func:`read_blocks`; an unusable line; no document at all.
    """
    found = False
    for path in expand_inputs(patterns):
        for block in read_blocks(path):
            documents = parse_block(block, text_field, domain_field)
            if documents.bad:
                raise DataError(str(documents.bad[0]))
            for text, line in zip(documents.texts, documents.lines, strict=True):
                found = True
                yield text, path, line
    if not found:
        raise DataError(f"{', '.join(patterns)}: the corpus holds no document")


def _load(line: bytes) -> Any:
    """A JSON value; what the fast parser refuses is for the other to accept, or to say what is wrong with it."""
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


def checked_text(text: Any, text_field: str) -> str:
    """``text`` if it is one that UTF-8 can hold.

    Raises:
        ValueError: it is not.
    """
    if type(text) is not str:
        raise ValueError(f"field '{text_field}' is {type(text).__name__}, not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"a lone surrogate at character {error.start}, which UTF-8 cannot hold") from None
    return text


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
