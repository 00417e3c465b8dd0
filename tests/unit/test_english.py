"""Docstrings, comments, messages and pages are in the field's English (the glossary is in CONTRIBUTING.md).

A docstring begins with a verb or a noun phrase that stands alone: it is read in a tooltip, without the line above it.
"""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted((REPOSITORY / "megatron_kd").rglob("*.py"))
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "examples/**/*.yaml", "examples/**/*.sh", "tools/*.py",
                    "benchmarks/*.py")
    for path in REPOSITORY.glob(pattern)
)  # fmt: skip
FRAGMENT = re.compile(
    r"(Of|From|As|With|Without|And|Or|To|In|On|At|By|For|Over|Under|Between|After|Before|Beside|Whose|Those|This|Until"
    r"|The same|Nothing\.|It|They|Some of|Both\.|See above)\b"
)
NOT_ENGLISH_OF_THE_FIELD = {
    "goes on": "resumes, continues",
    "go on": "resume, continue",
    "going on": "resuming, continuing",
    "passed over": "skipped",
    "passes over": "skips",
    "mend": "fix",
    "mends": "fixes",
    "mended": "fixed",
    "in the place of": "instead of, for",
    "of no interest": "say why it does nothing",
    "may not grow": "the disk is full",
    "that is nowhere": "say where it is",
    "laid over": "override",
    "by now": "say when",
    "what it tells of": "say what it describes",
    "comes up": "is raised",
}


def docstrings(path: Path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "module"), getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_docstrings_stand_alone(path):
    fragments = [f"{name}:{line}: {text[:60]}" for name, line, text in docstrings(path) if FRAGMENT.match(text)]
    assert not fragments


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_words_are_the_fields(path):
    text = path.read_text("utf-8")
    found = [
        f"{text[: match.start()].count(chr(10)) + 1}: '{match.group()}' (say: {better})"
        for phrase, better in NOT_ENGLISH_OF_THE_FIELD.items()
        for match in re.finditer(rf"\b{phrase}\b", text, re.IGNORECASE)
    ]
    assert not found
