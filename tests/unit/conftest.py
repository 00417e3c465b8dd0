"""A small tokenizer and corpus of the standard library's own sources, made once per test process."""

import json
import os
import signal
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer, train_byte_level_bpe
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

MODULES = ("argparse", "ast", "bdb", "calendar", "cmd", "code", "copy", "csv", "difflib", "enum", "heapq", "shlex")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real documents: a dozen modules, cut so that their lengths vary, and a few that are not English or ASCII."""
    sources = [(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text("utf-8") for name in MODULES]
    pieces = [source[: 2000 + 1500 * number] for number, source in enumerate(sources)]
    return [*pieces, "Zwölf Boxkämpfer! 你好，世界。 e\u0301 😀\n", "", "One. Two? Three!"]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return train_byte_level_bpe(texts, 600, tmp_path_factory.mktemp("tokenizer") / "bpe600")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> LoadedTokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Write one document per line, with a domain label in ``meta.set`` that cycles through three."""
    rows = [{"text": text, "meta": {"set": "abc"[number % 3]}} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chunks() -> list[np.ndarray]:
    """Forty chunks of 1 to 17 ids below 100; 0 is eos."""
    generator = np.random.default_rng(7)
    return [generator.integers(0, 100, generator.integers(1, 18)) for _ in range(40)]


@pytest.fixture
def dataset(tmp_path: Path, chunks: list[np.ndarray]) -> ChunkDataset:
    """The chunks in three shards."""
    return write_chunk_dataset(tmp_path / "dataset", chunks, plain_tokenizer_info(100), 16, chunks_per_shard=15)


def die_at_call(module: object, name: str, number: int) -> None:
    """Make the ``number``-th call of a function kill the process."""
    original = getattr(module, name)
    calls = 0

    def counted(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(module, name, counted)
