"""The quickstart's corpus: the Python standard library's own sources and documentation, as JSONL.

    python -m megatron_kd.quickstart.text OUTPUT.jsonl

A document is a source file, or a topic of the built-in documentation (``help("topics")``). Tables of character codes
and files that one document would let dominate a split are left out. The order is that of the hash of a document's
name, so it is mixed and the same on every machine with the same Python; the first 4 MB in that order are taken.
"""

import hashlib
import importlib.util
import itertools
import json
import sys
import sysconfig
from pathlib import Path
from typing import Iterator

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.cli import status_of
from megatron_kd.errors import DataError

MAX_DOCUMENT_BYTES = 160_000
MAX_CORPUS_BYTES = 4_200_000
MIN_DOCUMENT_BYTES = 200
# Not text that a model should learn from: installed packages, tests (not everywhere), tables, the topics' own file.
LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})
LEFT_OUT_FILES = frozenset({"topics.py"})


def standard_library_documents(root: Path | None = None) -> list[tuple[str, str]]:
    """(name, text) of every document, in the order of the names' hashes.

    Args:
        root: the library's folder; None means that of the running interpreter, and adds the documentation topics.

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
    """The first documents that have at most ``max_bytes`` UTF-8 bytes of text together."""
    ends = itertools.accumulate(len(text.encode("utf-8")) for _, text in documents)
    return [document for document, end in zip(documents, ends) if end <= max_bytes]


def write_jsonl(documents: list[tuple[str, str]], output: Path) -> int:
    """Write one ``{"name", "text"}`` a line, whole or not at all; returns the UTF-8 bytes of the texts."""
    lines = [json.dumps({"name": name, "text": text}, ensure_ascii=False) for name, text in documents]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, "".join(f"{line}\n" for line in lines))
    return sum(len(text.encode("utf-8")) for _, text in documents)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file that :func:`write_jsonl` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT_FOLDERS.intersection(name.parts[:-1]) or name.name in LEFT_OUT_FILES:
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
    """Write the corpus to the path given as the only argument."""
    documents = within_budget(standard_library_documents(), MAX_CORPUS_BYTES)
    size = write_jsonl(documents, Path(sys.argv[1]))
    sys.stdout.write(f"{len(documents)} documents, {size / 1e6:.1f} MB of text\n")


if __name__ == "__main__":
    sys.exit(status_of("quickstart.text", main))
