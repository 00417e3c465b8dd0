"""The corpus: its documents and their order; the tokenizer step as a process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_kd.errors import DataError
from megatron_kd.quickstart.corpus import read_texts, standard_library_documents, within_budget, write_jsonl

LONG = "x = 1  # " + "a" * 300 + "\n"


def library(root: Path) -> Path:
    for name, text in {
        "a.py": LONG,
        "pkg/b.py": LONG + "é",
        "pkg/data.txt": LONG,
        "site-packages/c.py": LONG,
        "test/d.py": LONG,
        "pkg/tests/e.py": LONG,
        "short.py": "x",
        "huge.py": "y" * 200_000,
        "pydoc_data/topics.py": LONG,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "latin.py").write_bytes(b"# coding: latin-1\n" + b"\xe9" * 300)
    return root


def test_sources_without_packages_tests_and_giants(tmp_path: Path) -> None:
    documents = standard_library_documents(library(tmp_path))
    assert sorted(name for name, _ in documents) == ["source:a.py", "source:pkg/b.py"]


def test_refuses_a_folder_without_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no Python source"):
        standard_library_documents(tmp_path)


def test_the_real_library_is_mixed_and_reproducible() -> None:
    documents = standard_library_documents()
    names = [name for name, _ in documents]
    assert documents == standard_library_documents()
    assert len(set(names)) == len(names) > 300
    assert names != sorted(names)
    assert any(name.startswith("source:asyncio/") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert 5e6 < sum(len(text) for _, text in documents) < 3e7


def test_jsonl_round_trip(tmp_path: Path) -> None:
    documents = [("a", 'line\nwith "quotes" and \u2028 separators'), ("b", "é")]
    size = write_jsonl(documents, tmp_path / "deep" / "corpus.jsonl")
    assert list(read_texts(tmp_path / "deep" / "corpus.jsonl")) == [text for _, text in documents]
    assert size == sum(len(text.encode()) for _, text in documents)


def test_budget_counts_bytes_not_characters() -> None:
    documents = [("a", "éé"), ("b", "xx"), ("c", "y")]
    assert within_budget(documents, 6) == documents[:2]
    assert within_budget(documents, 5) == documents[:1]
    assert within_budget(documents, 7) == documents


def test_trains_a_byte_level_bpe_that_round_trips(tmp_path: Path) -> None:
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (json, subprocess)]
    texts = [part for source in sources for part in source.split("\n\n")]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    program = [sys.executable, "-m", "megatron_kd.quickstart.corpus", "tokenizer"]
    subprocess.run([*program, str(corpus), "500", str(tmp_path / "tokenizer")], check=True, timeout=120)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 500
    text = "return é 漢 self.args"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("        return self.args").ids) < 12
