"""Corpus tools killed with SIGKILL at random moments and started again: the same bytes as never interrupted.

``KILL_SEED`` repeats a run. A program lowers the sizes at which parts and segments are cut, so that a small corpus has
many, and makes writes slow, so that kills land inside them.
"""

import json
import shutil
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.indexed_dataset import IndexedDatasetWriter
from megatron_kd.data.tokenization import train_byte_level_bpe
from tests.end_to_end.commands import kill, run, start
from tests.end_to_end.random_kills import seeded

PROGRAM = """
import sys, time, zlib
from megatron_kd.data import adopt_dataset, corpus_encoder, encoded_parts, external_shuffle, indexed_dataset
from megatron_kd.cli import main
corpus_encoder.PART_BYTES = 150_000
encoded_parts.WORTH_KEEPING = 0
adopt_dataset.SEGMENT_BYTES = 1 << 20
external_shuffle.PENDING_BYTES = 200_000

def slowly(owner, name, seconds):
    original = getattr(owner, name)
    def slow(*arguments):
        result = original(*arguments)
        time.sleep(seconds)
        return result
    setattr(owner, name, slow)

slowly(encoded_parts.PartWriter, "add", 0.02)
slowly(indexed_dataset.IndexedDatasetWriter, "add_bytes", 0.02)
slowly(external_shuffle.ExternalShuffle, "_append", 0.005)
slowly(adopt_dataset.ChecksumStream, "update", 0.05)
if __name__ == "__main__":
    main()
"""


@dataclass
class Scenario:
    """Commands that make ``out`` in a folder, one after another."""

    folder: Path
    commands: list[list[str]]
    expected: dict[str, bytes] = field(default_factory=dict)

    def program(self) -> Path:
        path = self.folder / "program.py"
        path.write_text(PROGRAM)
        return path

    def files(self) -> dict[str, bytes]:
        out = self.folder / "out"
        return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    def half_written(self) -> set[Path]:
        """What is under construction, or was when its writer was killed; every writer has names of its own."""
        return {*self.folder.glob("out.tmp-*"), *self.folder.glob("out.partial/part.tmp-*")}

    def make(self) -> None:
        for command in self.commands:
            ended = run(command[0], *command, program=self.program())
            assert ended.status == 0, ended.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1.2 MB of the standard library in two files, one of them gzip, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text("utf-8") for path in sorted(library.glob("*.py"))[:60] if path.stat().st_size < 60_000]
    rows = [json.dumps({"text": text, "set": "ab"[n % 2]}) + "\n" for n, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(rows[: len(rows) // 2]) + "bad\n", encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(rows[len(rows) // 2 :]), encoding="utf-8")
    train_byte_level_bpe(texts[:20], 600, folder / "tokenizer")
    return folder


def tokenize(corpus, folder, *more):
    return [
        "tokenize_corpus", f"input={corpus}/*.jsonl", f"tokenizer={corpus}/tokenizer", f"output={folder}/out",
        "data.seq_length=64", "skip_bad_lines=true", "engine=tokenizers", "workers=1", "domain_field=set", *more,
    ]  # fmt: skip


def one_run(corpus, folder):
    return [tokenize(corpus, folder)]


def tasks(corpus, folder):
    settings = ("chunking=sentence_end", "shuffle=false", "num_tasks=2")
    return [tokenize(corpus, folder, *settings, f"task_index={n}") for n in (0, 1)] + [
        tokenize(corpus, folder, *settings, "merge=true")
    ]


def adopt(corpus, folder):
    generator = np.random.default_rng(0)
    for number in range(2):
        writer = IndexedDatasetWriter(folder / f"data_{number}", np.dtype(np.uint16))
        writer.add(generator.integers(0, 600, 64 * 80_000), np.full(80_000, 64))
        writer.close()
    return [
        ["adopt_dataset", f"input={folder}/data_*.bin", f"tokenizer={corpus}/tokenizer", f"output={folder}/out",
         "sequences=documents", "data.seq_length=100"]
    ]  # fmt: skip


SCENARIOS = {"one run": one_run, "tasks and merge": tasks, "adopt": adopt}


@pytest.fixture(scope="module")
def scenario(corpus, tmp_path_factory):
    """A scenario by name, with what its uninterrupted run makes and how long its longest command takes."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("scenario")
            made[name] = Scenario(folder, SCENARIOS[name](corpus, folder))
            made[name].make()
            made[name].expected = made[name].files()
            ChunkDataset.open(folder / "out").verify()
        shutil.rmtree(made[name].folder / "out", ignore_errors=True)
        return made[name]

    return get


def strike(scenario, command, chance):
    """Start a command and kill it: inside a write three times of four; whether it struck, and inside a write."""
    left = scenario.half_written()
    process = start(command[0], *command, program=scenario.program())
    try:
        if chance.random() < 0.75:
            while process.poll() is None and not scenario.half_written() - left:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.5))
        else:
            time.sleep(chance.uniform(0.2, 2.5))
        struck = process.poll() is None
        assert struck or process.returncode == 0, process.stderr.read()
    finally:
        kill(process)
    return struck, struck and bool(scenario.half_written() - left)


def survive(scenario, kills, inside_wanted):
    chance = seeded()
    struck = inside = 0
    for _ in range(5 * kills):
        for command in scenario.commands:
            for _ in range(3):
                hit, in_write = strike(scenario, command, chance) if struck < kills else (False, False)
                struck, inside = struck + hit, inside + in_write
                if not hit:
                    break
            ended = run(command[0], *command, program=scenario.program())
            assert ended.status == 0, ended.stderr
        assert scenario.files() == scenario.expected
        assert not scenario.half_written() and not (scenario.folder / "out.partial").exists()
        shutil.rmtree(scenario.folder / "out")
        if struck >= kills:
            break
    assert struck >= kills and inside >= inside_wanted, f"{struck} kills, {inside} of them inside a write"


@pytest.mark.parametrize("name", ["one run"])
def test_two_kills(name, scenario):
    survive(scenario(name), 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_twenty_kills(name, scenario):
    survive(scenario(name), 20, 5)
