"""Documents of JSONL files, plain and compressed, and what is said of lines that hold none."""

import gzip
import json
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.data.corpus_files import DocumentFormat, Documents
from megatron_kd.data.jsonl import LineBlock, read_line_blocks
from megatron_kd.errors import DataError

TEXTS = ["one", "zwei\n\nLines", "三 \u2028 x \x85 y", "", '{"text": "nested"}', "😀" * 50]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def compressed(name: str, data: bytes) -> bytes:
    if name == "gzip":
        return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]) + b"\0" * 70_000
    if name == "zstd":
        whole = zstandard.ZstdCompressor()
        return whole.compress(data[: len(data) // 2]) + whole.compress(data[len(data) // 2 :])
    return data


def read_documents(path: Path) -> list[Documents]:
    """The documents of every block; a bad line is an error."""
    found = [block.parse(DocumentFormat()) for block in read_line_blocks(str(path))]
    for documents in found:
        if documents.bad:
            raise DataError(str(documents.bad[0]))
    return found


@pytest.mark.parametrize(
    ("kind", "extension"),
    [
        ("plain", "jsonl"), ("plain", "anything"), ("gzip", "jsonl.gz"), ("gzip", "jsonl"), ("gzip", "jsonl.zst"),
        ("zstd", "jsonl.zst"), ("zstd", "jsonl"), ("zstd", "jsonl.gz"),
    ],
)  # fmt: skip
def test_documents_with_their_places(tmp_path: Path, kind: str, extension: str) -> None:
    """The content's magic decides; members and frames after the first are read; line numbers count blank lines."""
    path = tmp_path / f"a.{extension}"
    path.write_bytes(compressed(kind, b"\xef\xbb\xbf" + LINES[:-1] + b"\n\n  \n" + b'{"text": "last"}'))
    found = read_documents(path)
    assert [text for documents in found for text in documents.texts] == [*TEXTS, "last"]
    assert [line for documents in found for line in documents.lines] == [1, 2, 3, 4, 5, 6, 9]
    assert {documents.path for documents in found} == {str(path)}


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=20),
    block_bytes=st.integers(1, 200),
    ascii_only=st.booleans(),
    compress=st.booleans(),
)
def test_blocks_of_any_size_hold_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], block_bytes: int, ascii_only: bool, compress: bool
) -> None:
    usable = [text for text in texts if not any("\ud800" <= character <= "\udfff" for character in text)]
    path = tmp_path_factory.mktemp("blocks") / "a.jsonl"
    data = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in usable).encode()
    path.write_bytes(gzip.compress(data) if compress else data)
    blocks = list(read_line_blocks(str(path), block_bytes))
    assert b"".join(block.data for block in blocks) == data
    assert sum(block.raw_bytes for block in blocks) == (path.stat().st_size if data else 0)
    parsed = [block.parse(DocumentFormat()) for block in blocks]
    assert [text for documents in parsed for text in documents.texts] == usable
    assert [line for documents in parsed for line in documents.lines] == list(range(1, len(usable) + 1))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', r"not valid JSON .*at column 13"),
        (b"nonsense", "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8 .byte 0xff at column 11"),
        (b'{"other": "a", "more": 1}', "no field 'text' .fields: other, more"),
        (b"{}", "no field 'text' .fields: none"),
        (b'{"text": 5}', "field 'text' is int, not a string"),
        (b'{"text": null}', "no field 'text'"),
        (b'["text"]', "not a JSON object but list"),
        (b'{"text": "\\ud800"}', "lone surrogate at character 0"),
        (b"[" * 100_000, "not valid JSON|nested too deeply|recursion"),
    ],
)
def test_bad_lines_name_their_place_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + line + b"\n" + LINES)
    with pytest.raises(DataError, match=rf"a\.jsonl:7: .*({reason})"):
        read_documents(path)
    documents = next(read_line_blocks(str(path))).parse(DocumentFormat())
    assert len(documents.texts) == 12 and len(documents.bad) == 1
    assert (documents.bad[0].path, documents.bad[0].line) == (str(path), 7)


def test_dotted_fields_and_domains() -> None:
    data = (
        b'{"a": {"b": "text"}, "meta": {"set": "x"}}\n{"a": {"b": "no domain"}}\n{"a": "flat", "meta": {"set": "x"}}\n'
    )
    documents = LineBlock("p", 1, data, 0).parse(DocumentFormat(text_field="a.b", domain_field="meta.set"))
    assert (documents.texts, documents.domains) == (["text"], ["x"])
    assert "no field 'meta.set'" in documents.bad[0].reason and "no field 'a.b'" in documents.bad[1].reason


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_truncated_and_damaged_archives_are_refused(tmp_path: Path, kind: str) -> None:
    generator = random.Random(1)
    text = "".join(json.dumps({"text": str(generator.random())}) + "\n" for _ in range(20_000)).encode()
    whole = gzip.compress(text) if kind == "gzip" else zstandard.ZstdCompressor(write_checksum=True).compress(text)
    path = tmp_path / "a.jsonl.x"
    for size in (len(whole) - 1, len(whole) // 2, 5):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated"):
            read_documents(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0x10
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"damaged (gzip|zstandard) data near byte|:\d+: "):
        read_documents(path)


@pytest.mark.parametrize("extension", ["gz", "zst"])
def test_a_misnamed_plain_file_is_refused(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.jsonl.{extension}"
    path.write_bytes(LINES)
    with pytest.raises(DataError, match="damaged (gzip|zstandard) data"):
        read_documents(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\n\n  \n", gzip.compress(b""), b"\xef\xbb\xbf"],
    ids=["nothing", "blank lines", "gzip of nothing", "mark"],
)
def test_an_empty_file_holds_no_document(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    assert not any(documents.texts for documents in read_documents(tmp_path / "a.jsonl"))
