"""``sample_by_difference``, ``split_dataset`` and ``convert_tokenization`` killed and run again: the same bytes, and
nothing that looks whole before it is. ``KILL_SEED`` repeats a run."""

import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.tokenization import load_tokenizer, train_byte_level_bpe
from megatron_kd.scoring.score_file import write_score_file
from tests.end_to_end.commands import kill, run, start
from tests.end_to_end.random_kills import seeded
from tests.end_to_end.test_corpus_path import python_sources
from tests.reference.datasets import write_chunk_dataset

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


def half_written(output: Path) -> set[Path]:
    """The output's temporary folders that hold ids; each writer's has a name of its own."""
    return {folder for folder in output.parent.glob(f"{output.name}.tmp-*") if any(folder.glob("*.bin*"))}


def strike(
    command: list[str], output: Path, wait_for_write: bool, seconds: float, chance: random.Random
) -> tuple[bool, bool]:
    """Kill at a random moment, of the writing of the folder or of all ``seconds``: (whether it ran, was it writing)."""
    left = half_written(output)  # by those that were killed before
    process = start(*command)
    deadline = time.monotonic() + (600 if wait_for_write else chance.uniform(0.1, seconds))
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if wait_for_write and half_written(output) - left:
                time.sleep(chance.uniform(0, 0.3))
                break
            time.sleep(0.002)
        struck = process.poll() is None
        assert struck or process.returncode == 0, process.stderr.read()
    finally:
        kill(process)
    return struck, struck and bool(half_written(output) - left)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sample_by_difference", "split_dataset", "convert_tokenization"])
def test_twenty_kills(verb: str, parts: Path, tmp_path: Path) -> None:
    chance, struck, inside = seeded(), 0, 0
    began = time.monotonic()
    assert run(verb, *arguments(verb, parts, tmp_path / "whole")).status == 0
    seconds = time.monotonic() - began
    expected, output = contents(tmp_path / "whole"), tmp_path / "out"
    while struck < 20 or inside < 5:
        command = [verb, *arguments(verb, parts, output)]
        hit, in_a_write = strike(command, output, inside < 8 and chance.random() < 0.7, seconds, chance)
        struck, inside = struck + hit, inside + in_a_write
        if output.exists():
            assert contents(output) == expected
            shutil.rmtree(output)
    ended = run(verb, *arguments(verb, parts, output))
    assert ended.status == 0, ended.stderr
    assert contents(output) == expected
    ChunkDataset.open(output).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
