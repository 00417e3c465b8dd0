import gzip
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.data import corpus_encoder, corpus_files
from megatron_kd.data.corpus_encoder import EncodingJob, encode_corpus, read_parts, units_of
from megatron_kd.data.corpus_files import BadLine, DocumentFormat
from megatron_kd.data.document_formats import read_blocks
from megatron_kd.data.encoded_parts import EncodedBlock, EncodedParts
from megatron_kd.data.tokenization import LoadedTokenizer
from megatron_kd.data.tokenizer_engine import encode_by_library, join_documents
from megatron_kd.errors import DataError
from tests.unit.conftest import write_jsonl


def job(folder: Path, **changes: object) -> EncodingJob:
    settings = dict(
        tokenizer=str(folder), eos_token=None, engine="gigatoken",
        form=DocumentFormat(domain_field="meta.set"), dtype="uint16", split_seed=3,
    )  # fmt: skip
    return EncodingJob(**{**settings, **changes})


def encode_files(files: list[str], job: EncodingJob, workers: int) -> list[EncodedBlock]:
    """All blocks, made anew."""
    with tempfile.TemporaryDirectory() as folder, parts_of(Path(folder) / "out", {}).opened(shared=False) as parts:
        return list(encode_corpus(units_of(files, job.form), job, parts, workers))


def summary(blocks: list[EncodedBlock]) -> tuple[object, ...]:
    return (
        np.concatenate([block.ids for block in blocks]).tolist(),
        np.concatenate([block.lengths for block in blocks]).tolist(),
        [domain for block in blocks for domain in block.domains],
        np.concatenate([block.split_hashes for block in blocks]).tolist(),
        [str(line) for line in bad_lines(blocks)],
        sum(block.text_bytes for block in blocks),
        sum(block.raw_bytes for block in blocks),
    )


def bad_lines(blocks: list[EncodedBlock]) -> list[BadLine]:
    """With their numbers in the file."""
    seen: dict[str, int] = {}
    found = []
    for block in blocks:
        before = seen.get(block.path, 0)
        found += [BadLine(line.path, before + line.line, line.reason) for line in block.bad]
        seen[block.path] = before + block.num_lines
    return found


def parts_of(output: Path, recipe: dict) -> EncodedParts:
    return EncodedParts(WorkStore(output, recipe))


@pytest.fixture
def files(tmp_path: Path, texts: list[str]) -> list[str]:
    one = write_jsonl(tmp_path / "one.jsonl", texts)
    with open(one, "ab") as file:
        file.write(b"bad\n")
    return [str(one), str(write_jsonl(tmp_path / "two.jsonl", texts[::-1]))]


def test_documents_become_ids_and_eos(
    files: list[str], tokenizer_folder: Path, tokenizer: LoadedTokenizer, texts: list[str]
) -> None:
    blocks = encode_files(files, job(tokenizer_folder), workers=1)
    everything = [*texts, *texts[::-1]]
    ids, lengths = join_documents(zip(encode_by_library(tokenizer.backend, everything)), 0, np.uint32)
    found = summary(blocks)
    assert found[0] == ids.tolist() and found[1] == lengths.tolist()
    assert found[2][:4] == ["a", "b", "c", "a"]
    assert found[3][: len(texts)] == found[3][len(texts) :][::-1]  # the same text, the same hash
    assert len(set(found[3])) == len(set(texts))
    assert found[4] == [f"{files[0]}:{len(texts) + 1}: not valid JSON (Expecting value at column 1)"]
    assert found[5] == sum(len(text.encode()) for text in everything)
    assert found[6] == sum(os.path.getsize(path) for path in files)
    assert blocks[0].ids.dtype == np.uint16


def test_block_size_engine_and_workers_change_nothing(
    files: list[str], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = summary(encode_files(files, job(tokenizer_folder), workers=1))
    small = lambda path, form, start, stop: read_blocks(path, form, 5000, start, stop)  # noqa: E731
    monkeypatch.setattr(corpus_encoder, "read_blocks", small)
    assert summary(encode_files(files, job(tokenizer_folder), workers=1)) == expected
    assert summary(encode_files(files, job(tokenizer_folder, engine="tokenizers"), workers=1)) == expected
    blocks = encode_files(files, job(tokenizer_folder), workers=2)
    assert len(blocks) > 10
    assert summary(blocks) == expected


@pytest.mark.parametrize("kind", ["plain", "gzip"])
def test_parts_are_the_same_whoever_makes_them_and_are_made_once(
    files: list[str], tokenizer_folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "gzip":
        for path in files:
            Path(path).write_bytes(gzip.compress(Path(path).read_bytes()))
    small = lambda path, form, start=0, stop=None: read_blocks(path, form, 5000, start, stop)  # noqa: E731
    monkeypatch.setattr(corpus_encoder, "read_blocks", small)
    monkeypatch.setattr(corpus_encoder, "PART_BYTES", 20_000)
    monkeypatch.setattr(corpus_files, "_RAW_PIECE_BYTES", 1000)
    work, parts = job(tokenizer_folder), parts_of(tmp_path / "parts", {"a": 1})
    units = units_of(files, work.form)
    assert len(units) == 2 if kind == "gzip" else len(units) > 8
    with parts.opened(shared=False):
        expected = summary(list(encode_corpus(units, work, parts, 1)))
    made = {path.name: path.read_bytes() for path in parts.store.folder.glob("*.part")}
    assert len(made) > 8
    assert summary(list(read_parts(units, parts))) == expected

    others = parts_of(tmp_path / "others", {"a": 1})
    for task in (1, 0):  # tasks in any order, each its share, the merge after them
        with others.opened(shared=True), pytest.raises(DataError, match="units are not encoded yet"):
            list(read_parts(units, others))
        with others.opened(shared=True):
            list(encode_corpus(units[task::2], work, others, 1))
    assert {path.name: path.read_bytes() for path in others.store.folder.glob("*.part")} == made

    names = sorted(made)
    damaged, lost = parts.store.folder / names[1], parts.store.folder / names[-1]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    lost.unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in parts.store.folder.glob("*.part")}
    with pytest.raises(DataError, match="not encoded yet|damaged part"):
        list(read_parts(units, parts))
    assert summary(list(encode_corpus(units, work, parts, 2))) == expected
    assert {path.name: path.read_bytes() for path in parts.store.folder.glob("*.part")} == made
    again = {
        path.name for path in parts.store.folder.glob("*.part") if path.stat().st_mtime_ns != stamps.get(path.name)
    }
    assert {names[1], names[-1]} <= again and len(again) < len(made)


def test_parts_of_another_corpus(tmp_path: Path, tokenizer_folder: Path, files: list[str]) -> None:
    work = job(tokenizer_folder)
    units = units_of(files, work.form)
    with parts_of(tmp_path / "parts", {"a": 1}).opened(shared=True) as parts:
        list(encode_corpus(units, work, parts, 1))
        with pytest.raises(DataError, match="another run is writing into it"):
            with parts_of(tmp_path / "parts", {"a": 1}).opened(shared=False):
                pass
    for shared in (True, False):
        with pytest.raises(DataError, match="holds unfinished work of another recipe"):
            with parts_of(tmp_path / "parts", {"a": 2}).opened(shared):
                pass
    assert parts.finished(units[0]).is_complete


def test_the_split_hash_depends_on_the_seed_and_is_left_out_without_one(
    files: list[str], tokenizer_folder: Path
) -> None:
    one = encode_files(files, job(tokenizer_folder), workers=1)[0].split_hashes
    other = encode_files(files, job(tokenizer_folder, split_seed=4), workers=1)[0].split_hashes
    assert not (one == other).any()
    assert len(encode_files(files, job(tokenizer_folder, split_seed=None), workers=1)[0].split_hashes) == 0


def test_a_merge_with_other_settings_removes_no_part(tmp_path: Path, tokenizer_folder: Path, files: list[str]) -> None:
    work = job(tokenizer_folder)
    units = units_of(files[:1], work.form)
    with parts_of(tmp_path / "parts", {"a": 1}).opened(shared=True) as parts:
        list(encode_corpus(units, work, parts, 1))
    made = {path.name: path.read_bytes() for path in parts.store.folder.glob("*.part")}
    assert len(made) == 1
    with pytest.raises(DataError, match="a 1 there, 2 now"):
        with parts_of(tmp_path / "parts", {"a": 2}).opened(shared=False, keep=True):
            pass
    with pytest.raises(DataError, match="a later failure"):
        with parts_of(tmp_path / "parts", {"a": 1}).opened(shared=False, keep=True):
            raise DataError("a later failure")
    assert {path.name: path.read_bytes() for path in parts.store.folder.glob("*.part")} == made
