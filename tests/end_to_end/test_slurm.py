"""The sbatch files under a real Slurm: warned, preempted, requeued and resumed; arrays; a teacher on a node of its own;
submit.sh with every step after those that it needs.

Slow: installs Slurm from Debian's packages where it is missing, and is skipped with the reason where it cannot.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.metrics.tracker import read_metrics
from tests.end_to_end.commands import REPOSITORY, SMALL, run
from tests.end_to_end.pile_stand_in import train_teacher, write_corpus
from tests.end_to_end.slurm_cluster import CannotRunSlurm, SlurmCluster, install

pytestmark = pytest.mark.slow
STEPS = 600
TOY_TRAINING = (
    "training.global_batch_size=4 training.micro_batch_size=2 training.train_iters=4 "
    "training.eval_interval=2 training.save_interval=2 training.precision=fp32 optimizer.lr_warmup_iters=2"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        install()
    except CannotRunSlurm as reason:
        pytest.skip(str(reason))
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "slurm") as slurm:
        slurm.environment["PYTHON"] = sys.executable
        slurm.environment["PYTHONPATH"] = str(REPOSITORY)
        yield slurm


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = run("train", *settings(dataset, folder))
    assert ended.status == 0, ended.stderr
    return folder


def settings(dataset, folder):
    return [
        f"data.path={dataset.path}",
        f"output={folder}",
        *SMALL,
        f"training.train_iters={STEPS}",
        "training.save_interval=10000",
    ]


def submit(cluster, log, *arguments, options=()):
    return cluster.submit(f"--chdir={REPOSITORY}", f"--output={log}", *options, *arguments)


def train_job(cluster, log, dataset, folder, *options):
    return submit(cluster, log, "examples/slurm/run.sbatch", "train", *settings(dataset, folder), options=options)


def rows_of(folder):
    return read_metrics(folder) if (folder / "metrics.jsonl").exists() else []


def finish(cluster, job, log, seconds=300):
    cluster.wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), seconds, "not done")
    assert cluster.state(job) == "COMPLETED", cluster.show(job) + log.read_text()


def assert_same(ours, whole):
    from tests.reference.full_state import load_full_state

    assert [row["loss"] for row in rows_of(ours)] == [row["loss"] for row in rows_of(whole)]
    (_, weights, _), (_, expected, _) = load_full_state(ours), load_full_state(whole)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def interrupt(cluster, job, by, folder):
    if by == "warning":  # what Slurm does before the time limit (#SBATCH --signal=B:USR1@…)
        cluster.command("scancel", "--signal=USR1", "--batch", str(job))
    elif by == "requeue":
        cluster.command("scontrol", "requeue", str(job))
    else:  # a job of higher priority wants the nodes
        cluster.submit(
            "--partition=urgent", "--exclusive", "--nodes=2", f"--output={folder}/urgent.log", "--wrap=sleep 1"
        )


@pytest.mark.parametrize("by", ["warning", "requeue", "preemption"])
def test_a_job_that_is_told_to_stop_goes_on_where_it_was(cluster, dataset, whole, tmp_path, by):
    folder, log = tmp_path / "run", tmp_path / "job.log"
    job = train_job(cluster, log, dataset, folder)
    cluster.wait(lambda: len(rows_of(folder)) >= 3, 300, "no step done")
    interrupt(cluster, job, by, tmp_path)
    cluster.wait(lambda: cluster.state(job) == "PENDING", 90, "not requeued")
    done = len(rows_of(folder))
    assert 3 <= done < STEPS, "it ended before it was told to stop"
    cluster.start_now(job)
    finish(cluster, job, log)
    text = log.read_text()
    assert "Restarts=1" in cluster.show(job) and "resumed at step" in text, text
    assert_same(folder, whole)


def test_an_array_does_one_line_a_task_and_a_dependent_job_waits(cluster, dataset, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text(
        "".join(f"data.path={dataset.path} output={tmp_path / f'run{i}'} training.seed={i}\n" for i in range(2))
    )
    first = submit(
        cluster,
        tmp_path / "array-%a.log",
        "examples/slurm/array.sbatch",
        str(lines),
        "train",
        *SMALL,
        "training.train_iters=2",
        options=["--array=0-1"],
    )
    second = submit(
        cluster,
        tmp_path / "after.log",
        "examples/slurm/run.sbatch",
        "inspect_dataset",
        f"path={tmp_path / 'run1/checkpoints/step_2'}",
        options=[f"--dependency=afterok:{first}"],
    )
    assert cluster.state(second) == "PENDING"
    finish(cluster, second, tmp_path / "after.log")
    assert len(rows_of(tmp_path / "run0")) == len(rows_of(tmp_path / "run1")) == 2


def test_an_array_tokenises_a_corpus_and_a_job_after_it_merges(cluster, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 200_000)
    keys = [f"input={corpus}/*.jsonl.zst", f"tokenizer={corpus / 'tokenizer'}", "data.seq_length=128", "workers=1"]
    ended = run("tokenize_corpus", *keys, f"output={tmp_path / 'alone'}")
    assert ended.status == 0, ended.stderr
    (tmp_path / "tasks").write_text("".join(f"num_tasks=2 task_index={i}\n" for i in range(2)))
    verb = ["tokenize_corpus", *keys, f"output={tmp_path / 'merged'}"]
    array = submit(
        cluster,
        tmp_path / "task-%a.log",
        "examples/slurm/array.sbatch",
        str(tmp_path / "tasks"),
        *verb,
        options=["--array=0-1"],
    )
    merge = submit(
        cluster,
        tmp_path / "merge.log",
        "examples/slurm/run.sbatch",
        *verb,
        "merge=true",
        options=[f"--dependency=afterok:{array}", "--export=ALL,GPUS=1"],
    )
    finish(cluster, merge, tmp_path / "merge.log")
    alone, merged = (ChunkDataset.open(tmp_path / name) for name in ("alone", "merged"))
    assert merged.fingerprint == alone.fingerprint and len(merged) > 0


def test_a_line_that_is_not_there(cluster, tmp_path):
    (tmp_path / "lines").write_text("a=1\n")
    job = submit(
        cluster,
        tmp_path / "x.log",
        "examples/slurm/array.sbatch",
        str(tmp_path / "lines"),
        "train",
        options=["--array=1-1", "--no-requeue"],
    )
    cluster.wait(lambda: cluster.state(job) == "FAILED", 60, "not failed")
    assert "has no line 2" in Path(tmp_path / "x.log").read_text()


def test_a_teacher_on_a_node_of_its_own(cluster, dataset, teacher, tmp_path):
    """remote_teacher.sbatch: the student's node and the teacher's are a heterogeneous job, one torchrun world."""
    keys = [
        f"data.path={dataset.path}",
        *SMALL,
        "training.train_iters=20",
        "training.save_interval=10000",
        "distillation.method=vanilla_kd",
        "teacher.placement=remote",
        "teacher.num_ranks=1",
        f"teacher.path={teacher}",
    ]
    alone, folder, log = tmp_path / "alone", tmp_path / "run", tmp_path / "job.log"
    ended = run("train", *keys, f"output={alone}", ranks=2)
    assert ended.status == 0, ended.stderr
    job = submit(
        cluster,
        log,
        "examples/slurm/remote_teacher.sbatch",
        "train",
        *keys,
        f"output={folder}",
        options=["--nodes=1", ":", "--nodes=1"],
    )
    finish(cluster, job, log)
    assert_same(folder, alone)


def test_submit_runs_every_step_after_those_that_it_needs(cluster, tmp_path):
    """examples/miniplm_pile_qwen/submit.sh as it is; the variables of paths.sh make it small."""
    corpus = write_corpus(tmp_path / "corpus")
    options = f"--nodes=1 --output={tmp_path}/%x.log"
    variables = {
        **cluster.environment,
        "SIZE": "200m",
        "CORPUS": f"{corpus}/*.jsonl.zst",
        "TEACHER": str(train_teacher(corpus, tmp_path / "teacher")),
        "DATA": str(tmp_path / "data"),
        "RUNS": str(tmp_path / "runs"),
        "SBATCH_GPU": options,
        "SBATCH_CPU": options,
        "TOKENIZE_OPTIONS": "heldout_fraction=0.05 reference_fraction=0.2",
        "TRAIN_OPTIONS": TOY_TRAINING,
        "REFERENCE_OPTIONS": "model.name=qwen_toy_reference",
        "STUDENT_OPTIONS": "model.name=qwen_toy_student",
    }
    ended = subprocess.run(
        [str(REPOSITORY / "examples/miniplm_pile_qwen/submit.sh")], env=variables, text=True, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr
    jobs = dict(re.findall(r"^(\w+): job (\d+)", ended.stdout, flags=re.MULTILINE))
    assert len(jobs) == 8
    last = int(jobs["heldout_200m"])
    assert cluster.state(last) == "PENDING" and "afterok" in cluster.show(last)
    cluster.wait(
        lambda: cluster.state(last) not in ("PENDING", "RUNNING") or "Never" in cluster.show(last), 500, "not done"
    )
    logs = "\n".join(
        f"{name}: {cluster.state(int(job))}\n{(tmp_path / f'{name}.log').read_text()[-1000:]}"
        for name, job in jobs.items()
        if (tmp_path / f"{name}.log").exists()
    )
    assert cluster.state(last) == "COMPLETED", logs
    assert 0 < json.loads((tmp_path / "runs/miniplm_200m/heldout.json").read_text())["bits_per_byte"] < 8
    finish(cluster, int(jobs["export_200m"]), tmp_path / "export_200m.log")
    assert (tmp_path / "runs/hf/miniplm_200m/model.safetensors").exists()


def test_two_torchrun_agents_are_two_nodes(dataset, tmp_path):
    """What run.sbatch starts on each of two nodes, on one machine without Slurm; beside one agent with two ranks."""
    keys = [f"data.path={dataset.path}", *SMALL, "training.train_iters=20", "parallel.tensor_model_parallel_size=2"]
    alone, folder = tmp_path / "alone", tmp_path / "run"
    ended = run("train", *keys, f"output={alone}", ranks=2)
    assert ended.status == 0, ended.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    agents = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--node-rank",
                str(node),
                "--nproc-per-node",
                "1",
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                port,
                str(REPOSITORY / "tools/train.py"),
                *keys,
                f"output={folder}",
            ],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    ended = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    assert_same(folder, alone)
