"""``sample_by_difference``, ``split_dataset`` and ``convert_tokenization`` killed and run again: the same bytes, and
nothing that looks whole before it is. ``KILL_SEED`` repeats a run."""

import os
import random
import secrets
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset, write_chunk_dataset
from megatron_kd.data.tokenization import load_tokenizer, train_byte_level_bpe
from megatron_kd.scoring.score_file import write_score_file
from tests.end_to_end.commands import kill, run, start
from tests.end_to_end.test_corpus_path import python_sources

CHUNKS = 40_000


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus large enough that writing takes a while, its scores, and another tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    sources = python_sources()
    tokenizer = load_tokenizer(train_byte_level_bpe(sources[:20], 400, folder / "tokenizer"))
    train_byte_level_bpe(sources[30:50], 350, folder / "other")
    ids = np.concatenate([np.array(tokenizer.backend.encode(source).ids) for source in sources[:20]])
    starts = np.random.default_rng(0).integers(0, len(ids) - 600, CHUNKS)
    chunks = (ids[start : start + 512] for start in starts)
    dataset = write_chunk_dataset(folder / "corpus", chunks, tokenizer.info, 512, 7000)
    for name in ("teacher", "reference"):
        scores = np.random.default_rng(len(name)).normal(3, 1, CHUNKS)
        write_score_file(folder / name, scores, dataset, {"fingerprint": name}, "float32", {"tool": "test"})
    return folder


def arguments(verb: str, parts: Path, output: Path) -> list[str]:
    own = {
        "sample_by_difference": [f"teacher_scores={parts}/teacher", f"reference_scores={parts}/reference"],
        "split_dataset": ["fraction=0.3"],
        "convert_tokenization": [f"tokenizer={parts}/other", "workers=1"],
    }
    return [f"data.path={parts}/corpus", f"output={output}", *own[verb]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which names the output's path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"
    }  # fmt: skip


def wait_for_moment(process, output: Path, in_a_write: bool, chance: random.Random) -> bool:
    """Until a random moment, inside the writing of the folder or anywhere; True if the process still runs."""
    deadline = time.monotonic() + (60 if in_a_write else chance.uniform(0.1, 4))
    while process.poll() is None and time.monotonic() < deadline:
        if in_a_write and any(any(folder.glob("*.bin*")) for folder in output.parent.glob(f"{output.name}.tmp-*")):
            time.sleep(chance.uniform(0, 0.3))
            break
        time.sleep(0.002)
    return process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sample_by_difference", "split_dataset", "convert_tokenization"])
def test_twenty_kills(verb: str, parts: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")
    chance, struck, inside = random.Random(seed), 0, 0
    assert run(verb, *arguments(verb, parts, tmp_path / "whole")).status == 0
    expected, output = contents(tmp_path / "whole"), tmp_path / "out"
    while struck < 20:
        in_a_write = inside < 8 and chance.random() < 0.7
        process = start(verb, *arguments(verb, parts, output))
        try:
            alive = wait_for_moment(process, output, in_a_write, chance)
        finally:
            kill(process)
        struck, inside = struck + alive, inside + (alive and in_a_write)
        if output.exists():
            assert contents(output) == expected
            shutil.rmtree(output)
    ended = run(verb, *arguments(verb, parts, output))
    assert ended.status == 0, ended.stderr
    assert contents(output) == expected and inside >= 5
    ChunkDataset.open(output).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
