"""The numbered steps of examples/miniplm_pile_qwen and examples/vanilla_kd_pile_qwen, as they are, on a small corpus.

Real text with the Pile's domain labels stands for the Pile, a toy teacher for Qwen1.5-1.8B; nothing but variables of
paths.sh differs from a run on a cluster.
"""

import json
import os
import subprocess
import sys

import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.metrics.tracker import read_metrics
from tests.end_to_end.commands import REPOSITORY, environment
from tests.end_to_end.pile_stand_in import DOMAINS, train_teacher, write_corpus

SMALL = (
    "training.global_batch_size=4 training.micro_batch_size=2 training.train_iters=4 training.eval_interval=2 "
    "training.save_interval=2 training.precision=fp32 optimizer.lr_warmup_iters=2"
)


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    root = tmp_path_factory.mktemp("pile")
    corpus = write_corpus(root / "corpus")
    return {
        **environment(),
        "PYTHON": sys.executable,
        "RANKS": "1",
        "SIZE": "200m",
        "CORPUS": f"{corpus}/*.jsonl.zst",
        "TEACHER": str(train_teacher(corpus, root / "teacher")),
        "DATA": str(root / "data"),
        "RUNS": str(root / "runs"),
        "TOKENIZE_OPTIONS": "heldout_fraction=0.05 reference_fraction=0.2",
        "TRAIN_OPTIONS": SMALL,
        "REFERENCE_OPTIONS": "model.name=qwen_toy_reference",
        "STUDENT_OPTIONS": "model.name=qwen_toy_student",
    }


def step(variables, script):
    ended = subprocess.run(
        [str(REPOSITORY / "examples" / script)], env=variables, cwd="/", capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, f"{script}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def miniplm(variables):
    """All steps of MiniPLM."""
    for script in sorted(path.name for path in (REPOSITORY / "examples/miniplm_pile_qwen").glob("[1-7]_*.sh")):
        step(variables, f"miniplm_pile_qwen/{script}")
    return variables


@pytest.mark.slow
def test_miniplm_from_documents_to_a_judged_student(miniplm):
    data, runs = miniplm["DATA"], miniplm["RUNS"]
    manifest = json.loads(open(f"{data}/train/manifest.json").read())
    assert set(DOMAINS) <= set(json.dumps(manifest, ensure_ascii=False).split('"')), "a domain is missing"
    whole, sampled = (ChunkDataset.open(f"{data}/{name}") for name in ("train", "sampled"))
    assert sampled.num_chunks == whole.num_chunks // 2
    rows = [row for row in read_metrics(f"{runs}/miniplm_200m") if "loss" in row]
    assert len(rows) == 4
    heldout = json.loads(open(f"{runs}/miniplm_200m/heldout.json").read())
    assert 0 < heldout["bits_per_byte"] < 8
    assert os.path.exists(f"{runs}/hf/miniplm_200m/model.safetensors")


@pytest.mark.slow
def test_vanilla_kd_on_the_same_corpus(miniplm):
    scripts = sorted(path.name for path in (REPOSITORY / "examples/vanilla_kd_pile_qwen").glob("[1-4]_*.sh"))
    said = "".join(step(miniplm, f"vanilla_kd_pile_qwen/{script}") for script in scripts)
    assert "/train is there" in said
    rows = [row for row in read_metrics(f"{miniplm['RUNS']}/vanilla_kd_200m") if "loss" in row]
    assert len(rows) == 4 and all(row["kd_loss"] > 0 for row in rows)


@pytest.mark.slow
def test_the_ratio_sweep_and_what_it_saves(miniplm):
    step({**miniplm, "RATIOS": "0.3"}, "sweeps/ratio.sh")
    said = step(miniplm, "sweeps/compute_saving.sh")
    for name in ("miniplm_200m", "ratio_200m_0.3"):
        assert f"{miniplm['RUNS']}/{name} " in said, said
    assert said.count("pretrain_200m's held-out loss") >= 2 and "reference_200m" not in said


def test_what_is_saved_is_read_from_the_runs_that_are_there(tmp_path):
    """Half and a tenth of the FLOPs, by the runs' own evaluations."""
    runs = (("pretrain_200m", 1e18), ("miniplm_200m", 5e17), ("ratio_200m_0.3", 1e17), ("ratio_500m_0.3", 1))
    for name, flops in runs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            f'{{"step": 2, "train_flops": {flops}, "eval_loss": 3.0, "bits_per_byte": 1.0}}\n'
        )
    variables = {**environment(), "PYTHON": sys.executable, "RUNS": str(tmp_path), "SIZE": "200m", "READ": "1"}
    said = step(variables, "sweeps/compute_saving.sh").splitlines()
    assert [line.split(" of the FLOPs")[0] for line in said] == [
        f"{tmp_path}/miniplm_200m needs 0.50",
        f"{tmp_path}/ratio_200m_0.3 needs 0.10",
    ]
    assert said[0].endswith(f"{tmp_path}/pretrain_200m's held-out loss 3.0000")


def test_submit_gives_every_step_to_slurm_after_what_it_needs(tmp_path):
    """With an ``sbatch`` that only notes what it was asked."""
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "$*" >> "$NOTES"\nwc -l < "$NOTES" | tr -d " "\n')
    (tmp_path / "sbatch").chmod(0o755)
    notes = tmp_path / "notes"
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes), "TASKS": "paper"}
    step(variables, "miniplm_pile_qwen/submit.sh")
    jobs = notes.read_text().splitlines()
    names = [line.split("--job-name=")[1].split()[0] for line in jobs]
    assert all(("--kill-on-invalid-dep=yes" in line) == ("--dependency" in line) for line in jobs)
    after = {name: line.partition("--dependency=afterok:")[2].split(" ")[0] for name, line in zip(names, jobs)}
    number = {name: str(index + 1) for index, name in enumerate(names)}
    assert after["tokenize"] == "" and after["reference"] == after["score_teacher"] == number["tokenize"]
    assert after["sample"] == f"{number['score_teacher']}:{number['score_reference']}"
    assert after["student_500m"] == number["sample"] and after["tasks_500m"] == number["export_500m"]
