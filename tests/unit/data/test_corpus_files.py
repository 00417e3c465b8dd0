"""Which files are read; line ranges of a file against splitting it in memory; what a file is compressed with."""

import gzip
import itertools
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_kd.data import corpus_files
from megatron_kd.data.corpus_files import compression_of, expand_inputs, lines_before, read_line_range, read_pieces
from megatron_kd.errors import DataError

TEXT = st.lists(st.sampled_from([b"a", b"\n", b"bc", b"\r\n", "é".encode()]), max_size=30).map(b"".join)


def lines_at(data: bytes) -> list[tuple[int, bytes]]:
    """(first byte, line) of every line."""
    lines = (
        data.splitlines(keepends=True)
        if b"\r" not in data
        else [line + b"\n" for line in data.split(b"\n")[:-1]] + [data.split(b"\n")[-1]]
    )
    starts = itertools.accumulate(map(len, lines), initial=0)
    return [(start, line) for start, line in zip(starts, lines) if line]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=TEXT, cuts=st.lists(st.integers(0, 70), max_size=4), piece=st.integers(1, 9))
def test_ranges_share_the_lines_out(tmp_path: Path, data: bytes, cuts: list[int], piece: int) -> None:
    """Every line is in the range in which it begins, wherever a file is cut and however it is read."""
    path = str(tmp_path / "file")
    Path(path).write_bytes(data)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, stop in itertools.pairwise(places):
        expected = b"".join(line for place, line in lines_at(data) if start <= place < stop)
        pieces = list(read_line_range(path, start, stop, piece))
        assert b"".join(text for text, _ in pieces) == expected and sum(size for _, size in pieces) == len(expected)
        assert lines_before(path, start) == sum(place < start for place, _ in lines_at(data))


def test_a_line_that_is_longer_than_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "_RAW_PIECE_BYTES", 4)
    (tmp_path / "file").write_bytes(b"x" * 50 + b"\nsecond\n")
    assert b"".join(text for text, _ in read_line_range(str(tmp_path / "file"), 10, 60)) == b"second\n"


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a", gzip.compress(b"text", mtime=0), "gzip"),
        ("a.txt", zstandard.compress(b"text"), "zstandard"),
        ("a.gz", b"", None),
        ("a.jsonl", b"text", None),
        ("a.gz", b"text", "gzip"),
        ("a.zstd", b"text", "zstandard"),
    ],
)
def test_compression_is_told_by_content_then_by_name(tmp_path: Path, name: str, data: bytes, kind: str | None) -> None:
    (tmp_path / name).write_bytes(data)
    assert compression_of(str(tmp_path / name)) == kind


def test_every_member_and_frame_is_read_and_counted(tmp_path: Path) -> None:
    for name, data in (
        ("z", zstandard.compress(b"one\n") + zstandard.compress(b"two\n")),
        ("g", gzip.compress(b"one\n") + gzip.compress(b"two\n") + b"\0\0"),
    ):
        (tmp_path / name).write_bytes(data)
        pieces = list(read_pieces(str(tmp_path / name)))
        assert b"".join(text for text, _ in pieces) == b"one\ntwo\n" and sum(size for _, size in pieces) == len(data)


def test_globs_are_sorted_and_files_taken_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "x[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    found = expand_inputs(
        [f"{tmp_path}/b.jsonl", f"{tmp_path}/?.jsonl", f"{tmp_path}/**/c.jsonl", f"{tmp_path}/x[1].jsonl"]
    )
    assert [Path(path).name for path in found] == ["b.jsonl", "a.jsonl", "c.jsonl", "x[1].jsonl"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("none.jsonl", "no such file"), ("*.parquet", "no file matches"), ("folder", "is a folder")],
)
def test_missing_input_is_refused(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        expand_inputs([str(tmp_path / pattern)])
