"""A small stand-in for the Pile: real text (the standard library's) with the Pile's 17 domain labels, and a teacher."""

import io
import json
import subprocess
import sys
from pathlib import Path

import zstandard

from tests.end_to_end.commands import REPOSITORY, environment, run

DOMAINS = (
    "ArXiv",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
)
BYTES = 1_500_000
VOCABULARY = 512


def module(name: str, *arguments: str) -> None:
    """Run one of the package's modules."""
    subprocess.run([sys.executable, "-m", name, *arguments], check=True, cwd=REPOSITORY, env=environment())


def write_corpus(folder: Path, size_limit: int = BYTES) -> Path:
    """Write two zstandard files of documents with ``meta.pile_set_name``, and a tokenizer; return the folder.

    Args:
        size_limit: characters of text.
    """
    folder.mkdir(parents=True)
    module("megatron_kd.quickstart.corpus", "text", str(folder / "text.jsonl"))
    module(
        "megatron_kd.quickstart.corpus",
        "tokenizer",
        str(folder / "text.jsonl"),
        str(VOCABULARY),
        str(folder / "tokenizer"),
    )
    documents, size = [], 0
    with open(folder / "text.jsonl", encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            text = json.loads(line)["text"]
            documents.append({"text": text, "meta": {"pile_set_name": DOMAINS[index % len(DOMAINS)]}})
            size += len(text)
            if size > size_limit and index >= len(DOMAINS):
                break
    for half in range(2):
        raw = io.BytesIO("".join(json.dumps(d) + "\n" for d in documents[half::2]).encode())
        (folder / f"{half:02d}.jsonl.zst").write_bytes(zstandard.compress(raw.getvalue()))
    return folder


def train_teacher(corpus: Path, folder: Path) -> Path:
    """Train a toy teacher on the corpus for a few steps, and return its exported Hugging Face folder."""
    done = [
        run(
            "tokenize_corpus",
            f"input={corpus}/*.jsonl.zst",
            f"tokenizer={corpus / 'tokenizer'}",
            f"output={folder / 'data'}",
            "data.seq_length=1024",
        ),
        run(
            "train",
            f"data.path={folder / 'data'}",
            f"output={folder / 'run'}",
            "model.name=qwen_toy_teacher",
            "training.train_iters=20",
            "training.global_batch_size=2",
            "training.micro_batch_size=2",
        ),
        run("convert_to_hf", f"input={folder / 'run'}", f"output={folder / 'hf'}"),
    ]
    for ended in done:
        assert ended.status == 0, ended.stderr
    return folder / "hf"
