"""The code of docs/extending.md runs as it stands, one program for each section."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
KINDS = ("Your own divergence in 20 lines", "Your own method", "Your own family")


def code(section: str) -> str:
    """The Python blocks of a section, in order."""
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL))


def test_every_kind_has_a_section_with_code():
    assert all(code(kind) for kind in KINDS)


@pytest.mark.parametrize("section", [section for section in SECTIONS if code(section)])
def test_the_code_of_a_section_runs(section, tmp_path):
    program = tmp_path / "example.py"
    program.write_text(code(section), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_divergence_takes_20_lines():
    lines = [line for line in code(KINDS[0]).partition("import torch\n")[0].splitlines() if line.strip()]
    assert len(lines) <= 20
