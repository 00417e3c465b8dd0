import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_kd.data import document_formats
from megatron_kd.data.corpus_files import DocumentFormat, Documents
from megatron_kd.data.document_formats import format_of, is_divisible, read_blocks
from megatron_kd.errors import DataError

TEXTS = [f"document {number}\n\nwith lines, ü 你好 " * (number % 7 + 1) for number in range(3000)]


def read(path: Path, form: DocumentFormat, block_bytes: int = 20_000) -> tuple[Documents, int, int]:
    """All documents of a file, how many blocks it took, and the raw bytes told."""
    whole, blocks, raw, lines = Documents(str(path), responses=[] if form.response_field else None), 0, 0, 0
    for block in read_blocks(str(path), form, block_bytes):
        block = block.load()
        assert block.first_line == lines + 1
        found = block.parse(form)
        for name in ("texts", "domains", "lines", "bad"):
            getattr(whole, name).extend(getattr(found, name))
        if whole.responses is not None:
            whole.responses.extend(found.responses or [])
        blocks, raw, lines = blocks + 1, raw + block.raw_bytes, lines + block.num_lines
    return whole, blocks, raw


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    rows = [{"text": text, "meta": {"set": "ab"[number % 2]}, "answer": "yes"} for number, text in enumerate(TEXTS)]
    rows[5]["text"] = None
    rows[7]["meta"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1100)
    return tmp_path / "a.parquet"


def test_parquet(parquet: Path) -> None:
    found, blocks, raw = read(parquet, DocumentFormat(domain_field="meta.set", response_field="answer"))
    good = [number for number in range(3000) if number not in (5, 7)]
    assert found.texts == [TEXTS[number] for number in good]
    assert found.domains == ["ab"[number % 2] for number in good] and found.lines == [number + 1 for number in good]
    assert found.responses == ["yes"] * 2998
    assert [str(line) for line in found.bad] == [
        f"{parquet}:6: column 'text' is null",
        f"{parquet}:8: column 'meta.set' is null",
    ]
    assert blocks > 10 and 0 < raw <= parquet.stat().st_size
    assert format_of(str(parquet), DocumentFormat()) == "parquet" and not is_divisible(str(parquet), DocumentFormat())


def test_damaged_or_foreign_parquet_is_refused(parquet: Path) -> None:
    with pytest.raises(DataError, match="no column 'body' .columns: answer, meta.set, text."):
        read(parquet, DocumentFormat(text_field="body"))
    data = bytearray(parquet.read_bytes())
    parquet.write_bytes(data[:-100])
    with pytest.raises(DataError, match="damaged Parquet file"):
        read(parquet, DocumentFormat())


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text(tmp_path: Path, name: str) -> None:
    """A file is one document, or many with a separator, which may stand anywhere."""
    path, mark = tmp_path / name, "<|sep|>\n"
    data = mark.join(TEXTS).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    whole, blocks, raw = read(path, DocumentFormat())
    assert whole.texts == [mark.join(TEXTS)] and blocks == 1 and raw == path.stat().st_size
    form = DocumentFormat(document_separator=mark)
    for block_bytes in (1, 3000, 10**9):
        found, blocks, raw = read(path, form, block_bytes)
        assert found.texts == TEXTS and raw == path.stat().st_size
        line = 1
        for text, number in zip(TEXTS, found.lines, strict=True):
            assert number == line
            line += text.count("\n") + 1


def test_plain_text_that_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n---\nbad\nline \xff here\n---\n \n---\n\xef\xbb\xbfmark stays inside")
    found, _, _ = read(path, DocumentFormat(document_separator="---\n"))
    assert found.texts == ["good\n", "\ufeffmark stays inside"]
    assert [(line.line, line.reason) for line in found.bad] == [(4, "not UTF-8 (byte 0xff)")]
    with pytest.raises(DataError, match="plain text has no field 'meta'"):
        read(path, DocumentFormat(domain_field="meta"))
    monkeypatch.setattr(document_formats, "MAX_LINE_BYTES", 10)
    with pytest.raises(DataError, match="begins on line 1 is longer than.*set document_separator"):
        read(path, DocumentFormat())
