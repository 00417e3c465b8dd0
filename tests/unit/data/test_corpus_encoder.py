import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data import corpus_encoder
from megatron_kd.data.corpus_encoder import EncodedBlock, EncodingJob, encode_files
from megatron_kd.data.documents import read_blocks
from megatron_kd.data.tokenization import LoadedTokenizer, append_eos, encode_with_tokenizers
from tests.unit.data.conftest import write_jsonl


def job(folder: Path, **changes: object) -> EncodingJob:
    settings = dict(
        tokenizer=str(folder), eos_token=None, engine="gigatoken", text_field="text",
        domain_field="meta.set", dtype="uint16", split_seed=3,
    )  # fmt: skip
    return EncodingJob(**{**settings, **changes})


def summary(blocks: list[EncodedBlock]) -> tuple[object, ...]:
    return (
        np.concatenate([block.ids for block in blocks]).tolist(),
        np.concatenate([block.lengths for block in blocks]).tolist(),
        [domain for block in blocks for domain in block.domains],
        np.concatenate([block.split_hashes for block in blocks]).tolist(),
        [str(line) for block in blocks for line in block.bad],
        sum(block.text_bytes for block in blocks),
        sum(block.raw_bytes for block in blocks),
    )


@pytest.fixture
def files(tmp_path: Path, texts: list[str]) -> list[str]:
    one = write_jsonl(tmp_path / "one.jsonl", texts)
    with open(one, "ab") as file:
        file.write(b"bad\n")
    return [str(one), str(write_jsonl(tmp_path / "two.jsonl", texts[::-1]))]


def test_documents_become_ids_and_eos(
    files: list[str], tokenizer_folder: Path, tokenizer: LoadedTokenizer, texts: list[str]
) -> None:
    blocks = list(encode_files(files, job(tokenizer_folder), workers=1))
    everything = [*texts, *texts[::-1]]
    ids, lengths = append_eos(*encode_with_tokenizers(tokenizer.backend, everything), 0)
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
    expected = summary(list(encode_files(files, job(tokenizer_folder), workers=1)))
    monkeypatch.setattr(corpus_encoder, "read_blocks", lambda path: read_blocks(path, block_bytes=5000))
    assert summary(list(encode_files(files, job(tokenizer_folder), workers=1))) == expected
    assert summary(list(encode_files(files, job(tokenizer_folder, engine="tokenizers"), workers=1))) == expected
    blocks = list(encode_files(files, job(tokenizer_folder), workers=2))
    assert len(blocks) > 10
    assert summary(blocks) == expected


def test_the_split_hash_depends_on_the_seed_and_is_left_out_without_one(
    files: list[str], tokenizer_folder: Path
) -> None:
    one = next(encode_files(files, job(tokenizer_folder), workers=1)).split_hashes
    other = next(encode_files(files, job(tokenizer_folder, split_seed=4), workers=1)).split_hashes
    assert not (one == other).any()
    assert len(next(encode_files(files, job(tokenizer_folder, split_seed=None), workers=1)).split_hashes) == 0


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, tokenizer_folder: Path, texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "many.jsonl", texts * 20)
    program = f"""
import multiprocessing, os, sys, time
from megatron_kd.data import corpus_encoder
from megatron_kd.data.documents import read_blocks
if __name__ == "__main__":
    corpus_encoder.read_blocks = lambda path: read_blocks(path, block_bytes=5000)
    job = corpus_encoder.EncodingJob({str(tokenizer_folder)!r}, None, "tokenizers", "text", None, "uint16", None)
    blocks = corpus_encoder.encode_files([{str(path)!r}], job, workers=2)
    next(blocks)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(worker) for worker in workers)


def is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"
