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
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "examples/**/*.yaml", "examples/**/*.sh",
                    "examples/**/*.sbatch", "tools/*.py", "benchmarks/*.py", "Makefile", "Dockerfile")
    for path in REPOSITORY.glob(pattern)
    if path.name != "CONTRIBUTING.md"  # its glossary quotes what is not written
)  # fmt: skip
FRAGMENT = re.compile(
    r"(Of|From|As|With|Without|And|Or|To|In|On|At|By|For|Over|Under|Between|After|Before|Beside|Whose|Those|This|Until"
    r"|The same|Nothing\.|It|They|Some of|Both\.|See above)\b"
)
COUNTED = (
    "bits bytes chunks draws FLOP FLOPs GB GiB GFLOP ids MB micro-batches milliseconds ms nats numbers operations "
    "processes ranks rows samples seconds sequences steps tokens values words"
)
PER = (
    "byte chunk device document draw entry file GPU id layer line logit micro-batch node parameter position process "
    "rank record row run second sequence shard stage step student task token word"
)
AFTER_A_RATE = r"(?=\s*([.,;:)|\"'=]|\Z)|\s+(and|are|as|at|by|for|from|in|is|of|on|or|over|that|to|under|with)\b)"
"""A rate ends here; "the bytes a rank sends" is none."""
NOT_ENGLISH_OF_THE_FIELD = {
    rf"({COUNTED.replace(' ', '|')}) an? ({PER.replace(' ', '|')}){AFTER_A_RATE}": "per …",
    r"go(es|ing)? on": "resume, continue",
    r"passed over": "skipped",
    r"mend(s|ed|ing)?": "fix",
    r"laid over": "override",
    r"in the place of": "instead of, for",
    r"(a|the|its|each) teacher (says|knows)": "teacher targets, the teacher's distribution",
    r"writ(e|es|ing|ten) token by token": "generate",
    r"nothing to do": "say what was found",
    r"of no interest": "say why it does nothing",
    r"most easier": "say which difference is largest",
    r"may not grow": "the disk is full",
    r"that is nowhere": "say where it is",
    r"can(not| be|not be) had": "is missing, cannot be loaded",
    r"tells? of": "describe, name",
    r"for a person": "as text",
    r"comes? up": "is raised",
    r"in earnest": "in a real run",
    r"by now": "say when",
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


def found_in(text: str) -> list[tuple[re.Match[str], str]]:
    """What of the list stands in a text, also across the end of a line, with what to write instead."""
    return [
        (match, better)
        for phrase, better in NOT_ENGLISH_OF_THE_FIELD.items()
        for match in re.finditer(rf"\b(?:{phrase})\b".replace(" ", r"\s+"), text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_words_are_the_fields(path):
    text = path.read_text("utf-8")
    assert not [
        f"{text[: match.start()].count(chr(10)) + 1}: '{match.group()}' (say: {better})"
        for match, better in found_in(text)
    ]


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("39 bytes a token", True),
        ("the bytes a rank sends", False),
        ("a token a byte long", False),
        ("training goes\non", True),
        ("the mending of a run", True),
        ("an amendment", False),
        ("what a teacher says", True),
        ("for every step", False),
    ],
)
def test_the_list_finds_what_it_should(text, is_found):
    assert bool(found_in(text)) == is_found
