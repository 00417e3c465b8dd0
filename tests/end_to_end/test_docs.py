"""Every command of docs/, in order, in a shell; every configuration of the examples; names, links and line lengths."""

import dataclasses
import re
import typing

import pytest

from megatron_kd.cli import VERBS
from megatron_kd.config import load_config
from megatron_kd.data.tokenize_corpus import TokenizeCorpusConfig
from megatron_kd.planning.plan import make_plan
from megatron_kd.planning.plan_run import PlanRunConfig
from megatron_kd.selection.sample_by_difference import SampleByDifferenceConfig
from megatron_kd.training.train_config import TrainConfig
from tests.end_to_end.commands import REPOSITORY
from tests.end_to_end.pile_stand_in import train_teacher, write_corpus
from tests.end_to_end.workshop import Material, Workshop, commands

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [*sorted(REPOSITORY.glob("*.md")), *DOCS, *sorted((REPOSITORY / "examples").glob("**/README.md"))]
PAGE = REPOSITORY / "docs/laptop_to_cluster.md"
PILE = sorted(
    path for name in ("miniplm", "vanilla_kd") for path in (REPOSITORY / f"examples/{name}_pile_qwen").glob("*.yaml")
)
TRAINING = [path for path in PILE if path.stem not in ("tokenize_corpus", "sample_by_difference", "base")]
WITH_COMMANDS = ["checkpoints", "corpus", "difference_sampling", "teacher_cache", "teachers"]
"""Pages beside PAGE whose commands run here, in a folder of their own."""
PROGRAMS = r"^\s*(?:python|torchrun|sbatch|examples/|tools/|make|pip|\.?/)[^\n]*"
SMALL = (
    "training.global_batch_size=4 training.micro_batch_size=2 training.train_iters=10 training.eval_interval=2 "
    "training.save_interval=5 training.precision=fp32 optimizer.lr_warmup_iters=2"
)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_configuration_can_be_trained_and_planned(path):
    given = ["data.path=d", "output=o", *(["teacher.path=t"] if "vanilla" in str(path) else [])]
    config = load_config(TrainConfig, path, given)
    plan = make_plan(load_config(PlanRunConfig, path))
    assert plan.models[0].name == config.model.name
    if "vanilla" in str(path):  # the paper's rounding of what costs 100K steps of plain pre-training
        formula = next(budget for budget in plan.budgets if budget.method == "vanilla_kd").paper
        assert config.training.train_iters == formula.printed


def test_the_corpus_configurations():
    folder = REPOSITORY / "examples/miniplm_pile_qwen"
    given = ["input=x", "output=o", "tokenizer=t", "heldout_output=h", "reference_output=r"]
    tokens = load_config(TokenizeCorpusConfig, folder / "tokenize_corpus.yaml", given)
    assert tokens.domain_field == "meta.pile_set_name" and tokens.chunking == "sentence_end"
    sampling = ["data.path=d", "teacher_scores=t", "reference_scores=r", "output=o"]
    assert load_config(SampleByDifferenceConfig, folder / "sample_by_difference.yaml", sampling).ratio == 0.5


def test_the_page_has_its_commands():
    text = "\n".join(commands(PAGE))
    for verb in (
        "plan_run",
        "submit.sh",
        "run.sbatch",
        "array.sbatch",
        "remote_teacher.sbatch",
        "plot",
        "evaluate",
        "fit_scaling_law",
        "compute_saving",
        "ratio.sh",
    ):
        assert verb in text, verb


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    workshop = Workshop(tmp_path, few_steps={})
    workshop.run(
        PAGE,
        1500,
        RANKS="1",
        SIZE="500m",
        CORPUS=f"{corpus}/*.jsonl.zst",
        TEACHER=str(train_teacher(corpus, tmp_path / "teacher")),
        DATA=str(tmp_path / "data"),
        RUNS=str(tmp_path / "runs"),
        TOKENIZE_OPTIONS="heldout_fraction=0.05 reference_fraction=0.2",
        TRAIN_OPTIONS=SMALL,
        REFERENCE_OPTIONS="model.name=qwen_toy_reference",
        STUDENT_OPTIONS="model.name=qwen_toy_student",
    )
    logs = tmp_path / "logs"
    for made in ("plan.json", "runs.png", "heldout.json", "law/scaling_law.png", "law_500m/scaling_law.json"):
        assert (logs / made).stat().st_size > 0, made
    jobs = workshop.notes.read_text()
    assert jobs.count("examples/slurm/") >= 10 and "remote_teacher.sbatch" in jobs


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material.make(tmp_path_factory.mktemp("material"))


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_the_other_pages_runs(page, material, tmp_path):
    workshop = Workshop(tmp_path)
    workshop.stock(material)
    workshop.run(REPOSITORY / f"docs/{page}.md", 1200)


def test_no_command_is_left_out():
    """What looks like a command is in a bash block, and every page with such a block is run above."""
    assert {page.stem for page in DOCS if commands(page)} == {*WITH_COMMANDS, PAGE.stem}
    for page in DOCS:
        others = re.sub(r"^```bash\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for block in re.findall(r"^```[^\n]*\n(.*?)^```$", others, flags=re.MULTILINE | re.DOTALL):
            assert not re.search(PROGRAMS, block, flags=re.MULTILINE), f"{page.name}:\n{block}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_and_links_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    roots = (REPOSITORY, REPOSITORY / "megatron_kd", REPOSITORY / "examples", page.parent)
    named = re.findall(r"`((?:\w[\w.-]*/)+[\w*.-]+\.(?:py|md|sh|sbatch|yaml))`", text)
    named = [name for name in named if not name.startswith("runs/")]
    named += re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [name for name in named if not any(list(root.glob(name)) for root in roots)]
    assert not missing


def keys_of(schema, prefix=""):
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        kind = typing.get_type_hints(schema)[field.name]
        for part in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(part):
                yield from keys_of(part, f"{prefix}{field.name}.")


@pytest.fixture(scope="module")
def every_key():
    return {key for verb in VERBS.values() for key in keys_of(verb.load_config_class())}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # which names keys by their old names too
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_keys_that_a_page_names_are_keys(page, every_key):
    text = page.read_text(encoding="utf-8")
    sections = {key.partition(".")[0] for key in every_key if "." in key}
    dotted = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[=:][^`]*)?`", text)
    unknown = {
        key
        for key in dotted
        if key.partition(".")[0] in sections and key not in every_key and not key.endswith((".jsonl", ".png"))
    }
    last = {key.rpartition(".")[2] for key in every_key}
    assert not unknown | {key for key in re.findall(r"`([a-z_]+)=(?!\")[^`]*`", text) if key not in last}


@pytest.mark.parametrize("page", ["README.md", "docs/laptop_to_cluster.md", "docs/installation.md", "docs/scaling.md"])
def test_lines_fit_a_terminal(page):
    lines = (REPOSITORY / page).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_every_example_is_listed_and_explained():
    folders = sorted(path.name for path in (REPOSITORY / "examples").iterdir() if path.is_dir() and any(path.iterdir()))
    listed = re.findall(r"\]\((\w+)/README\.md\)", (REPOSITORY / "examples/README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == folders


def test_the_readme_starts_with_what_to_type():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("```"))
    assert first <= 20 and "make quickstart" in "\n".join(lines[first : first + 5])
