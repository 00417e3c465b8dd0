"""What the files of a corpus hold: JSONL, Parquet or plain text; one reader and one parser for all.

    path  →  read_blocks: a few MiB each, cheap, in one process  →  parse: texts, domains, faults, in the workers

``auto`` goes by content and name: Parquet by its magic, plain text by ``.txt`` (also ``.txt.gz``, ``.txt.zst``), else
JSONL. A plain-text file is one document, or several with ``document_separator`` between them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_kd.data import documents as jsonl
from megatron_kd.data.byte_pieces import compression_of, read_pieces
from megatron_kd.data.documents import BLOCK_BYTES, MAX_LINE_BYTES, BadLine, Documents, LineBlock, checked_text
from megatron_kd.errors import DataError

Kind = Literal["auto", "jsonl", "parquet", "text"]
_PARQUET_MAGIC = b"PAR1"
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class DocumentFormat:
    """Where a document's text is in a file; see the keys of ``tokenize_corpus``."""

    kind: Kind = "auto"
    text_field: str = "text"
    domain_field: str | None = None
    response_field: str | None = None
    document_separator: str | None = None


@dataclass(frozen=True)
class TextBlock:
    """Whole documents of a plain-text file; ``first_line`` counts from 1, ``num_lines`` are covered."""

    path: str
    first_line: int
    data: bytes
    raw_bytes: int
    num_lines: int


@dataclass(frozen=True)
class RowBlock:
    """Rows of a Parquet file: ``columns`` by field name, ``num_lines`` values each; rows are counted from 1."""

    path: str
    first_line: int
    columns: dict[str, list[Any]]
    raw_bytes: int
    num_lines: int


@dataclass(frozen=True)
class RangeBlock:
    """The lines of a plain JSONL file that begin at byte ``start`` or later and before ``stop``; not read yet."""

    path: str
    start: int
    stop: int

    def load(self) -> LineBlock:
        """Read them.

        Raises:
            DataError: a line is longer than ``MAX_LINE_BYTES``.
        """
        pieces = [block.data for block in jsonl.read_blocks(self.path, MAX_LINE_BYTES, self.start, self.stop)]
        return LineBlock(self.path, 1, b"".join(pieces), self.stop - self.start, self.start == 0)


Block = LineBlock | TextBlock | RowBlock | RangeBlock
LoadedBlock = LineBlock | TextBlock | RowBlock


def kind_of(path: str, form: DocumentFormat) -> Kind:
    """``jsonl``, ``parquet`` or ``text``.

    Raises:
        DataError: the file's kind has no fields and the format asks for one.
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
    return kind_of(path, form) == "jsonl" and compression_of(path) is None


def read_blocks(
    path: str, form: DocumentFormat, block_bytes: int = BLOCK_BYTES, start: int = 0, stop: int | None = None
) -> Iterator[Block]:
    """Cut a file into blocks of whole documents, about ``block_bytes`` each; the same ones whoever reads it.

    Args:
        path: the file.
        form: what it holds.
        block_bytes: of decompressed data.
        start, stop: of a divisible file, the lines that begin in this range of bytes only; they are left to
            :func:`load`.

    Raises:
        DataError: the file is damaged, or a document too long to hold.
    """
    kind = kind_of(path, form)
    if kind == "jsonl" and stop is not None:
        return (RangeBlock(path, first, min(first + block_bytes, stop)) for first in range(start, stop, block_bytes))
    if kind == "jsonl":
        return jsonl.read_blocks(path, block_bytes)
    if kind == "parquet":
        return _parquet_blocks(path, form, block_bytes)
    return _text_blocks(path, form.document_separator, block_bytes)


def load(block: Block) -> LoadedBlock:
    """The block with its data; what a worker does first."""
    return block.load() if isinstance(block, RangeBlock) else block


def parse(block: LoadedBlock, form: DocumentFormat) -> Documents:
    """The documents of a block; those of white space alone are none, and no fault."""
    if isinstance(block, LineBlock):
        return jsonl.parse_block(block, form.text_field, form.domain_field, form.response_field)
    if isinstance(block, RowBlock):
        return _parse_rows(block, form)
    return _parse_text(block, form.document_separator)


def _text_blocks(path: str, separator: str | None, block_bytes: int) -> Iterator[TextBlock]:
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


def _parse_text(block: TextBlock, separator: str | None) -> Documents:
    found = Documents(block.path)
    data = block.data.removeprefix(b"\xef\xbb\xbf") if block.first_line == 1 else block.data
    line = block.first_line
    for part in data.split(separator.encode()) if separator else [data]:
        if part and not part.isspace():
            try:
                found.texts.append(part.decode("utf-8"))
                found.domains.append("")
                found.lines.append(line)
            except UnicodeDecodeError as error:
                place = line + part.count(b"\n", 0, error.start)
                found.bad.append(BadLine(block.path, place, f"not UTF-8 (byte 0x{part[error.start]:02x})"))
        line += part.count(b"\n") + (separator.count("\n") if separator else 0)
    return found


def _parquet_blocks(path: str, form: DocumentFormat, block_bytes: int) -> Iterator[RowBlock]:
    import pyarrow
    import pyarrow.parquet

    fields = [field for field in (form.text_field, form.domain_field, form.response_field) if field]
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            known = {column.path for column in (file.schema.column(i) for i in range(len(file.schema)))}
            if missing := [field for field in fields if field not in known]:
                raise DataError(f"{path}: no column '{missing[0]}' (columns: {', '.join(sorted(known)[:8])})")
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
    """A record batch as blocks; more than one if its texts are long."""
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


def _parse_rows(block: RowBlock, form: DocumentFormat) -> Documents:
    found = Documents(block.path, responses=[] if form.response_field else None)
    for row in range(block.num_lines):
        number = block.first_line + row
        try:
            text = _value(block, form.text_field, row)
            domain = _value(block, form.domain_field, row) if form.domain_field else ""
            response = _value(block, form.response_field, row) if form.response_field else ""
        except ValueError as error:
            found.bad.append(BadLine(block.path, number, str(error)))
            continue
        found.texts.append(text)
        found.domains.append(domain)
        found.lines.append(number)
        if found.responses is not None:
            found.responses.append(response)
    return found


def _value(block: RowBlock, field: str, row: int) -> str:
    value = block.columns[field][row]
    if value is None:
        raise ValueError(f"column '{field}' is null")
    return checked_text(value, field)
