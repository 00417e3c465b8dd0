"""Formats of a corpus's files: JSONL (``jsonl.py``), Parquet and plain text.

    path  →  read_blocks: a few MiB each, in one process  →  load, parse: texts, domains, faults, in the workers

``auto`` goes by content and name: Parquet by its magic, plain text by ``.txt`` (also ``.txt.gz``, ``.txt.zst``), else
JSONL. A plain-text file is one document, or several with ``document_separator`` between them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_kd.data.corpus_files import (
    BLOCK_BYTES,
    MAX_LINE_BYTES,
    BadLine,
    Block,
    DocumentFormat,
    Documents,
    FormatName,
    checked_text,
    compression_of,
    read_pieces,
)
from megatron_kd.data.jsonl import RangeBlock, read_line_blocks
from megatron_kd.errors import DataError

_PARQUET_MAGIC = b"PAR1"
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class TextBlock:
    """Whole documents of a plain-text file; ``first_line`` counts from 1, ``num_lines`` are covered."""

    path: str
    first_line: int
    data: bytes
    raw_bytes: int
    num_lines: int

    @property
    def size(self) -> int:
        """Bytes of the text."""
        return len(self.data)

    def load(self) -> "TextBlock":
        """Return the block itself."""
        return self

    def parse(self, form: DocumentFormat) -> Documents:
        """Cut the text at the separator, or take it as one document without one."""
        separator = form.document_separator
        found = Documents(self.path)
        data = self.data.removeprefix(b"\xef\xbb\xbf") if self.first_line == 1 else self.data
        line = self.first_line
        for part in data.split(separator.encode()) if separator else [data]:
            if part and not part.isspace():
                try:
                    found.texts.append(part.decode("utf-8"))
                    found.domains.append("")
                    found.lines.append(line)
                except UnicodeDecodeError as error:
                    place = line + part.count(b"\n", 0, error.start)
                    found.bad.append(BadLine(self.path, place, f"not UTF-8 (byte 0x{part[error.start]:02x})"))
            line += part.count(b"\n") + (separator.count("\n") if separator else 0)
        return found


@dataclass(frozen=True)
class RowBlock:
    """Rows of a Parquet file: ``columns`` by field name, ``num_lines`` values each; rows are counted from 1."""

    path: str
    first_line: int
    columns: dict[str, list[Any]]
    raw_bytes: int
    num_lines: int

    @property
    def size(self) -> int:
        """Characters of the texts."""
        return sum(len(value) for column in self.columns.values() for value in column if isinstance(value, str))

    def load(self) -> "RowBlock":
        """Return the block itself."""
        return self

    def parse(self, form: DocumentFormat) -> Documents:
        """Take each row's fields."""
        found = Documents(self.path, responses=[] if form.response_field else None)
        for row in range(self.num_lines):
            number = self.first_line + row
            try:
                text = self._value(form.text_field, row)
                domain = self._value(form.domain_field, row) if form.domain_field else ""
                response = self._value(form.response_field, row) if form.response_field else ""
            except ValueError as error:
                found.bad.append(BadLine(self.path, number, str(error)))
                continue
            found.texts.append(text)
            found.domains.append(domain)
            found.lines.append(number)
            if found.responses is not None:
                found.responses.append(response)
        return found

    def _value(self, field: str, row: int) -> str:
        value = self.columns[field][row]
        if value is None:
            raise ValueError(f"column '{field}' is null")
        return checked_text(value, field)


def format_of(path: str, form: DocumentFormat) -> FormatName:
    """Return ``jsonl``, ``parquet`` or ``text``.

    Raises:
        DataError: the file's format has no fields, and ``form`` names one.
    """
    kind = form.kind
    if kind == "auto":
        with open(path, "rb") as file:
            is_parquet = file.read(4) == _PARQUET_MAGIC
        bare = path.removesuffix(".gz").removesuffix(".zst").removesuffix(".zstd")
        kind = "parquet" if is_parquet else "text" if bare.endswith(".txt") else "jsonl"
    if kind == "text" and (form.domain_field or form.response_field):
        field = form.domain_field or form.response_field
        raise DataError(f"{path}: plain text has no field '{field}'; leave domain_field and response_field out")
    return kind


def is_divisible(path: str, form: DocumentFormat) -> bool:
    """Whether byte ranges of the file can be read on their own."""
    return format_of(path, form) == "jsonl" and compression_of(path) is None


def read_blocks(
    path: str, form: DocumentFormat, block_bytes: int = BLOCK_BYTES, start: int = 0, stop: int | None = None
) -> Iterator[Block]:
    """Cut a file into blocks of whole documents, about ``block_bytes`` each; the same ones whoever reads it.

    Args:
        path: the file.
        form: what it holds.
        block_bytes: of decompressed data.
        start, stop: only the lines of a divisible file that begin in this range of bytes; its blocks are read when they
            are loaded.

    Raises:
        DataError: the file is damaged, or a document too long to hold.
    """
    if stop is not None:
        return (RangeBlock(path, first, min(first + block_bytes, stop)) for first in range(start, stop, block_bytes))
    return _READERS[format_of(path, form)](path, form, block_bytes)


def _jsonl_blocks(path: str, form: DocumentFormat, block_bytes: int) -> Iterator[Block]:
    return read_line_blocks(path, block_bytes)


def _text_blocks(path: str, form: DocumentFormat, block_bytes: int) -> Iterator[Block]:
    separator = form.document_separator
    mark = separator.encode() if separator else None
    pending, first_line, raw_bytes = bytearray(), 1, 0
    for piece, raw in read_pieces(path):
        pending += piece
        raw_bytes += raw
        cut = pending.rfind(mark) if mark and len(pending) >= block_bytes else -1
        if cut >= 0:
            cut += len(mark or b"")
            lines = pending.count(b"\n", 0, cut)
            yield TextBlock(path, first_line, bytes(pending[:cut]), raw_bytes, lines)
            first_line, raw_bytes = first_line + lines, 0
            del pending[:cut]
        if len(pending) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}: the document that begins on line {first_line} is longer than {MAX_LINE_BYTES >> 20} MiB; "
                "set document_separator to what stands between documents"
            )
    if pending:
        yield TextBlock(path, first_line, bytes(pending), raw_bytes, pending.count(b"\n") + 1)


def _parquet_blocks(path: str, form: DocumentFormat, block_bytes: int) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    fields = [field for field in (form.text_field, form.domain_field, form.response_field) if field]
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            known = {column.path for column in (file.schema.column(i) for i in range(len(file.schema)))}
            if missing := [field for field in fields if field not in known]:
                raise DataError(
                    f"{path}: no column '{missing[0]}' (columns: {', '.join(sorted(known)[:8])}); change the field keys"
                )
            group_bytes = [
                sum(group.column(i).total_compressed_size for i in range(group.num_columns))
                for group in (file.metadata.row_group(i) for i in range(file.num_row_groups))
            ]
            first_line = 1
            for number in range(file.num_row_groups):
                rows = file.metadata.row_group(number).num_rows
                told = 0
                for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[number], columns=fields, use_threads=False):
                    told += batch.num_rows
                    raw = group_bytes[number] if told == rows else 0
                    yield from _cut_rows(path, first_line, batch, fields, raw, block_bytes)
                    first_line += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged Parquet file ({' '.join(str(error).split())[:150]}); copy it again") from None


def _cut_rows(
    path: str, first_line: int, batch: Any, fields: list[str], raw_bytes: int, block_bytes: int
) -> Iterator[RowBlock]:
    """Cut a record batch into blocks: more than one if its texts are long."""
    columns = {field: _column(batch, field) for field in fields}
    step = max(1, batch.num_rows * block_bytes // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, step):
        part = {field: values[start : start + step] for field, values in columns.items()}
        last = start + step >= batch.num_rows
        size = min(step, batch.num_rows - start)
        yield RowBlock(path, first_line + start, part, raw_bytes if last else 0, size)


def _column(batch: Any, field: str) -> list[Any]:
    top, *rest = field.split(".")
    values = batch.column(top).to_pylist()
    for key in rest:
        values = [None if value is None else value.get(key) for value in values]
    return values


_READERS: dict[FormatName, Callable[[str, DocumentFormat, int], Iterator[Block]]] = {
    "jsonl": _jsonl_blocks,
    "parquet": _parquet_blocks,
    "text": _text_blocks,
}
