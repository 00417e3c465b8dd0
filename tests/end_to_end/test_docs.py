"""docs/laptop_to_cluster.md: every command, in order, in one shell; and every configuration of the examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kd.config import load_config
from megatron_kd.data.sample_by_difference import SampleByDifferenceConfig
from megatron_kd.data.tokenize_corpus import TokenizeCorpusConfig
from megatron_kd.planning.config import PlanRunConfig
from megatron_kd.planning.plan import make_plan
from megatron_kd.training.config import TrainConfig
from tests.end_to_end.commands import REPOSITORY, environment
from tests.end_to_end.pile_stand_in import train_teacher, write_corpus

PAGE = REPOSITORY / "docs/laptop_to_cluster.md"
PILE = sorted(path for name in ("miniplm", "vanilla_kd") for path in
              (REPOSITORY / f"examples/{name}_pile_qwen").glob("*.yaml"))
TRAINING = [path for path in PILE if path.stem not in ("tokenize_corpus", "sample_by_difference", "base")]
SMALL = ("training.global_batch_size=4 training.micro_batch_size=2 training.train_iters=10 training.eval_interval=2 "
         "training.save_interval=5 training.precision=fp32 optimizer.lr_warmup_iters=2")


def commands(page: Path) -> list[str]:
    """The bash blocks of a page."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


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
    for verb in ("plan_run", "submit.sh", "run.sbatch", "array.sbatch", "remote_teacher.sbatch", "plot", "evaluate",
                 "fit_scaling_law", "compute_saving", "ratio.sh"):
        assert verb in text, verb


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path):
    """In one shell with ``set -e``; ``sbatch`` notes what it is asked (a real Slurm is in test_slurm.py)."""
    corpus = write_corpus(tmp_path / "corpus")
    programs = tmp_path / "bin"
    programs.mkdir()
    notes = tmp_path / "jobs"
    (programs / "sbatch").write_text(f'#!/bin/bash\necho "$*" >> {notes}\nwc -l < {notes} | tr -d " "\n')
    (programs / "sbatch").chmod(0o755)
    (programs / "python").write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    variables = {
        **environment(), "PATH": f"{programs}:{os.environ['PATH']}", "RANKS": "1", "SIZE": "500m",
        "CORPUS": f"{corpus}/*.jsonl.zst", "TEACHER": str(train_teacher(corpus, tmp_path / "teacher")),
        "DATA": str(tmp_path / "data"), "RUNS": str(tmp_path / "runs"),
        "TOKENIZE_OPTIONS": "heldout_fraction=0.05 reference_fraction=0.2", "TRAIN_OPTIONS": SMALL,
        "REFERENCE_OPTIONS": "model.name=qwen_toy_reference", "STUDENT_OPTIONS": "model.name=qwen_toy_student",
    }
    logs = tmp_path / "logs"
    script = "set -euo pipefail\nset -x\n" + "\n".join(commands(PAGE)).replace("logs/", f"{logs}/")
    logs.mkdir()
    ended = subprocess.run(["bash", "-c", script], env=variables, cwd=REPOSITORY, capture_output=True, text=True,
                           timeout=570)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    for made in ("plan.json", "runs.png", "heldout.json", "law/scaling_law.png", "law_500m/scaling_law.json"):
        assert (logs / made).stat().st_size > 0, made
    jobs = notes.read_text()
    assert jobs.count("examples/slurm/") >= 10 and "remote_teacher.sbatch" in jobs
