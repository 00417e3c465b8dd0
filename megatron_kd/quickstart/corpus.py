"""The quickstart's corpus, the Python standard library's own sources and documentation, and a tokenizer trained on it.

    python -m megatron_kd.quickstart.corpus text OUTPUT.jsonl
    python -m megatron_kd.quickstart.corpus tokenizer CORPUS.jsonl VOCAB_SIZE OUTPUT_FOLDER

A document is a source file, or a topic of the built-in documentation (``help("topics")``). Tables of character codes,
and files large enough to dominate a split, are left out. Documents are ordered by the hash of their names, so that the
order is mixed and equal on every machine with the same Python; the first 4 MB in that order are taken.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.cli import status_of
from megatron_kd.data.tokenization import train_byte_level_bpe
from megatron_kd.errors import DataError

MAX_DOCUMENT_BYTES = 160_000
MAX_CORPUS_BYTES = 4_200_000
MIN_DOCUMENT_BYTES = 200
# Text that a model should not learn from: installed packages, tests (which some installations lack), tables.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})
EXCLUDED_FILES = frozenset({"topics.py"})  # The documentation's topics are documents of their own.


def standard_library_documents(root: Path | None = None) -> list[tuple[str, str]]:
    """Return (name, text) of every document, in the order of the names' hashes.

    Args:
        root: the library's folder; None for that of the running interpreter, with the documentation's topics.

    Raises:
        DataError: there is no readable source below ``root``.
    """
    documents = dict(_sources(Path(sysconfig.get_path("stdlib")) if root is None else root))
    if not documents:
        raise DataError(f"{root or sysconfig.get_path('stdlib')}: holds no Python source; is this a full Python?")
    if root is None:
        documents.update(_topics())
    return sorted(documents.items(), key=lambda document: hashlib.sha256(document[0].encode()).digest())


def within_budget(documents: list[tuple[str, str]], max_bytes: int) -> list[tuple[str, str]]:
    """Return the first documents whose texts have at most ``max_bytes`` UTF-8 bytes together."""
    ends = itertools.accumulate(len(text.encode("utf-8")) for _, text in documents)
    return [document for document, end in zip(documents, ends) if end <= max_bytes]


def write_jsonl(documents: list[tuple[str, str]], output: Path) -> int:
    """Write one ``{"name", "text"}`` per line, atomically; return the UTF-8 bytes of the texts."""
    lines = [json.dumps({"name": name, "text": text}, ensure_ascii=False) for name, text in documents]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, "".join(f"{line}\n" for line in lines))
    return sum(len(text.encode("utf-8")) for _, text in documents)


def read_texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file that :func:`write_jsonl` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(name.parts[:-1]) or name.name in EXCLUDED_FILES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a few sources declare another encoding
            continue
        if MIN_DOCUMENT_BYTES <= len(text.encode("utf-8")) <= MAX_DOCUMENT_BYTES:
            yield f"source:{name.as_posix()}", text


def _topics() -> Iterator[tuple[str, str]]:
    if importlib.util.find_spec("pydoc_data.topics") is None:
        return
    from pydoc_data.topics import topics

    for name, text in topics.items():
        if len(text.encode("utf-8")) >= MIN_DOCUMENT_BYTES:
            yield f"topic:{name}", text


def main() -> None:
    """Write the text, or train the tokenizer on it, as the command line asks."""
    parser = argparse.ArgumentParser(prog="quickstart.corpus", description="The quickstart's text and tokenizer.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="write the corpus")
    text.add_argument("output", type=Path)
    tokenizer = commands.add_parser("tokenizer", help="train a byte-level BPE on every document of a corpus")
    tokenizer.add_argument("corpus", type=Path)
    tokenizer.add_argument("vocab_size", type=int)
    tokenizer.add_argument("output", type=Path)
    options = parser.parse_args()
    if options.command == "text":
        documents = within_budget(standard_library_documents(), MAX_CORPUS_BYTES)
        size = write_jsonl(documents, options.output)
        sys.stdout.write(f"{len(documents)} documents, {size / 1e6:.1f} MB of text\n")
    else:
        train_byte_level_bpe(read_texts(options.corpus), options.vocab_size, options.output)
        sys.stdout.write(f"{options.output}: byte-level BPE of {options.vocab_size} ids\n")


if __name__ == "__main__":
    sys.exit(status_of("quickstart.corpus", main))
