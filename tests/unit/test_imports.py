"""Imports of the package point one way, between packages and between files, and lead from the shell to the loss."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_kd"
LAYERS = (
    ("errors", "logs"),
    ("config",),
    ("artefacts", "parallel", "losses"),
    ("data", "models"),
    ("costs", "checkpoints"),
    ("metrics", "scoring", "generation"),
    ("selection", "teachers"),
    ("training",),
    ("conversion", "evaluation", "planning"),
    ("cli",),
    ("quickstart",),
)
"""The layers, bottom first. A part imports from layers below its own, never from its own or from above."""
LARGEST_FILE = 400
MOST_MODULES = 185


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_by(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron_kd":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "megatron_kd")
    return found


IMPORTS = {name: imported_by(path) for name, path in MODULES.items()}


def part_of(module: str) -> str:
    """The package, or the module beside the packages, that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_every_part_of_the_package_has_a_layer():
    parts = {part_of(name) for name in MODULES} - {"megatron_kd"}
    assert parts == {part for layer in LAYERS for part in layer}


def test_imports_between_packages_point_down():
    height = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = {
        f"{importer} imports {imported}"
        for importer, targets in IMPORTS.items()
        for imported in targets
        if part_of(importer) != part_of(imported) and height[part_of(imported)] >= height[part_of(importer)]
    }
    assert not wrong


def test_no_file_imports_itself_through_others():
    def reaches(start: str) -> set[str]:
        seen, pending = set(), [start]
        while pending:
            for target in IMPORTS.get(pending.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        return seen

    assert not [name for name in MODULES if name in reaches(name)]


def test_no_import_is_for_a_type_checker_alone():
    assert not [name for name, path in MODULES.items() if "TYPE_CHECKING" in path.read_text("utf-8")]


def test_losses_know_neither_models_nor_teachers_nor_megatron_core():
    for name in (name for name in MODULES if part_of(name) == "losses"):
        assert {part_of(target) for target in IMPORTS[name]} <= {"losses", "errors", "logs"}, name
        assert "megatron.core" not in MODULES[name].read_text("utf-8"), name


def test_files_are_few_and_none_is_too_long():
    assert len(MODULES) <= MOST_MODULES
    long = {
        name: lines for name, path in MODULES.items() if (lines := path.read_text("utf-8").count("\n")) > LARGEST_FILE
    }
    assert not long


def test_a_name_of_a_file_says_which_file():
    stems = Counter(path.stem for path in MODULES.values() if path.stem != "__init__")
    assert not [stem for stem, count in stems.items() if count > 1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is(name):
    if MODULES[name].read_text("utf-8").strip():
        assert ast.get_docstring(ast.parse(MODULES[name].read_text("utf-8"))), name


def test_the_readme_names_the_path_from_the_shell_to_the_loss():
    """Each file imports the next; the schedule, which calls the objective, is imported by the step."""
    text = (PACKAGE.parent / "README.md").read_text("utf-8")
    claim = re.search(r"\*\*From the shell to the loss\*\*.*?\n\n", text, re.DOTALL).group()
    tool, cli, *files = re.findall(r"`([\w/]+\.py)`", claim.partition("More in")[0])
    assert (tool, cli) == ("tools/train.py", "cli.py")
    assert "megatron_kd.cli" in imported_by(PACKAGE.parent / tool)
    path = ["megatron_kd." + name.removesuffix(".py").replace("/", ".") for name in files]
    schedule = path.pop(path.index("megatron_kd.parallel.schedule"))
    assert path[0] == "megatron_kd.training.train" and len(path) == 5
    for importer, imported in zip(path, path[1:]):
        assert imported in IMPORTS[importer], f"{importer} does not import {imported}"
    assert schedule in IMPORTS["megatron_kd.training.train_step"]
    assert "def linear_distillation_loss" in MODULES[path[-1]].read_text("utf-8")
