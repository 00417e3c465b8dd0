"""The sbatch files under a real Slurm: warned, requeued and resumed; preempted; arrays; a job that waits for another.

Not here: remote_teacher.sbatch, since Slurm puts the components of a heterogeneous job on different nodes.
Slow: installs Slurm from Debian's packages where it is missing, and is skipped with the reason where it cannot.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_kd.metrics.tracker import read_metrics
from tests.end_to_end.commands import REPOSITORY, SMALL, run
from tests.end_to_end.slurm_cluster import CannotRunSlurm, SlurmCluster, install

pytestmark = pytest.mark.slow
STEPS = 600


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
    return [f"data.path={dataset.path}", f"output={folder}", *SMALL, f"training.train_iters={STEPS}",
            "training.save_interval=10000"]


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
    from megatron_kd.training.checkpoint import load_full_state

    assert [row["loss"] for row in rows_of(ours)] == [row["loss"] for row in rows_of(whole)]
    (_, weights, _), (_, expected, _) = load_full_state(ours), load_full_state(whole)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("by", ["warning", "preemption"])
def test_a_job_that_is_told_to_stop_goes_on_where_it_was(cluster, dataset, whole, tmp_path, by):
    folder, log = tmp_path / "run", tmp_path / "job.log"
    job = train_job(cluster, log, dataset, folder)
    cluster.wait(lambda: len(rows_of(folder)) >= 3, 300, "no step done")
    if by == "warning":  # what Slurm does before the time limit (#SBATCH --signal=B:USR1@…)
        cluster.command("scancel", "--signal=USR1", "--batch", str(job))
    else:
        cluster.command("scontrol", "requeue", str(job))
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
    lines.write_text("".join(f"data.path={dataset.path} output={tmp_path / f'run{i}'} training.seed={i}\n"
                             for i in range(2)))
    first = submit(cluster, tmp_path / "array-%a.log", "examples/slurm/array.sbatch", str(lines), "train", *SMALL,
                   "training.train_iters=2", options=["--array=0-1"])
    second = submit(cluster, tmp_path / "after.log", "examples/slurm/run.sbatch", "inspect_dataset",
                    f"path={tmp_path / 'run1/checkpoints/step_2'}", options=[f"--dependency=afterok:{first}"])
    assert cluster.state(second) == "PENDING"
    finish(cluster, second, tmp_path / "after.log")
    assert len(rows_of(tmp_path / "run0")) == len(rows_of(tmp_path / "run1")) == 2


def test_a_line_that_is_not_there(cluster, tmp_path):
    (tmp_path / "lines").write_text("a=1\n")
    job = submit(cluster, tmp_path / "x.log", "examples/slurm/array.sbatch", str(tmp_path / "lines"), "train",
                 options=["--array=1-1", "--no-requeue"])
    cluster.wait(lambda: cluster.state(job) == "FAILED", 60, "not failed")
    assert "has no line 2" in Path(tmp_path / "x.log").read_text()


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
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
             "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port,
             str(REPOSITORY / "tools/train.py"), *keys, f"output={folder}"],
            cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]
    ended = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    assert_same(folder, alone)
