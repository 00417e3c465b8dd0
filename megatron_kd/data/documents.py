"""Documents from JSONL files: plain, gzip or zstandard, one JSON object a line.

    files and globs  →  read_blocks: whole lines in blocks of a few MiB  →  parse_block: texts, domains, faults

Both steps hold a bounded amount in memory whatever the size of the corpus. A block is what one worker process handles.
"""

import glob
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import zstandard

from megatron_kd.errors import DataError

BLOCK_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20
_RAW_PIECE_BYTES = 64 << 10
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file.

    Attributes:
        path: the file.
        first_line: number of the first line, from 1.
        data: the lines' bytes; all but possibly the file's last end with a newline.
        raw_bytes: how many bytes of the file (compressed, if it is) were read for this block; for progress.
    """

    path: str
    first_line: int
    data: bytes
    raw_bytes: int


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
    """The documents of one block, in order; three lists of the same length, and the lines that were not usable."""

    path: str
    texts: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)


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


def read_blocks(path: str, block_bytes: int = BLOCK_BYTES) -> Iterator[LineBlock]:
    """Cut a file into blocks of whole lines, about ``block_bytes`` each (more only if one line is longer).

    Raises:
        DataError: a compressed file is truncated or damaged.
    """
    pending: list[bytes] = []
    pending_bytes = 0
    first_line = 1
    raw_bytes = 0
    for piece, raw in _pieces(path, min(block_bytes, _PIECE_BYTES)):
        pending.append(piece)
        pending_bytes += len(piece)
        raw_bytes += raw
        if pending_bytes < block_bytes or b"\n" not in piece:
            continue
        data = b"".join(pending)
        cut = data.rfind(b"\n") + 1
        yield LineBlock(path, first_line, data[:cut], raw_bytes)
        first_line += data.count(b"\n", 0, cut)
        pending, pending_bytes, raw_bytes = [data[cut:]], len(data) - cut, 0
    if pending_bytes:
        yield LineBlock(path, first_line, b"".join(pending), raw_bytes)


def parse_block(block: LineBlock, text_field: str = "text", domain_field: str | None = None) -> Documents:
    """Parse the lines of a block. Lines of white space alone hold no document and are no fault.

    Args:
        block: from :func:`read_blocks`.
        text_field: key of the text, dotted for nested objects.
        domain_field: key of the domain label, dotted; None gives every document the domain ``""``.
    """
    documents = Documents(block.path)
    text_keys = text_field.split(".")
    domain_keys = domain_field.split(".") if domain_field else []
    data = block.data.removeprefix(_BOM) if block.first_line == 1 else block.data
    for number, line in enumerate(data.split(b"\n"), start=block.first_line):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            text = _text_of(row, text_keys, text_field)
            domain = _domain_of(row, domain_keys, domain_field) if domain_keys else ""
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
            documents.bad.append(BadLine(block.path, number, reason))
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg} at column {error.colno})"
            documents.bad.append(BadLine(block.path, number, reason))
        except (ValueError, RecursionError) as error:
            documents.bad.append(BadLine(block.path, number, str(error) or "nested too deeply"))
        else:
            documents.texts.append(text)
            documents.domains.append(domain)
            documents.lines.append(number)
    return documents


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


def _text_of(row: Any, keys: list[str], text_field: str) -> str:
    if type(row) is not dict:
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    text = _lookup(row, keys)
    if text is None:
        raise ValueError(f"no field '{text_field}' (fields: {', '.join(list(row)[:8]) or 'none'})")
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


def _pieces(path: str, piece_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Decompressed pieces of a file, each with the raw bytes read for it; by the file's magic, else its extension."""
    with open(path, "rb") as file:
        head = file.read(4)
        file.seek(0)
        is_gzip, is_zstd = head.startswith(_GZIP_MAGIC), head == _ZSTD_MAGIC
        if head and not is_gzip and not is_zstd:
            is_gzip, is_zstd = path.endswith(".gz"), path.endswith((".zst", ".zstd"))
        if is_gzip:
            yield from _decompress(path, file, _gzip_member, "gzip")
        elif is_zstd:
            yield from _decompress(path, file, _zstd_frame, "zstandard")
        else:
            while piece := file.read(piece_bytes):
                yield piece, len(piece)


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
