"""The sbatch files in a shell whose ``srun``, ``scontrol`` and ``scancel`` note what they are asked, and answer.

What needs a real Slurm is in test_slurm.py; here is what cannot be had there: eight GPUs a node, containers, the time
limit of every verb, a preemption that is long past.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import REPOSITORY

SRUN = f"""#!{sys.executable}
import json, os, subprocess, sys
words = sys.argv[1:]
command = next(i for i, word in enumerate(words) if not word.startswith("--"))
note = dict(options=words[:command], command=words[command:], pid=os.getpid())
print(json.dumps(note), file=open("srun.json", "w"), flush=True)
os.environ.update(SLURM_NTASKS="2", SLURM_PROCID="1")
os.execvp(words[command], words[command:])
"""
PYTHON = f"""#!{sys.executable}
import json, os, signal, sys, time
ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
note = dict(arguments=sys.argv[1:], path=os.environ["PYTHONPATH"], ignores_the_warning=ignored)
print(json.dumps(note), file=open("started.tmp", "w"), flush=True)
os.rename("started.tmp", "started.json")
time.sleep(float(os.environ.get("RUNS_FOR", "0")))
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""
SCONTROL = """#!/bin/bash
echo "$*" >> scontrol
case $1 in
    show) case $2 in hostnames) printf 'n1\\nn2\\n' ;; job) echo "$RECORD" ;; esac ;;
    requeue) kill -TERM $PPID ;;
esac
"""
SCANCEL = """#!/bin/bash
echo "$*" >> scancel
kill -TERM "$(sed 's/.*"pid": \\([0-9]*\\).*/\\1/' srun.json)"
"""


@pytest.fixture
def job(tmp_path):
    """Start a script as a job's batch shell: (script, arguments, variables) → process."""
    shutil.copytree(REPOSITORY / "examples/slurm", tmp_path / "examples/slurm")
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}

    def start(script, *arguments, **variables):
        environment = {
            **kept,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": "python",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "RECORD": "",
            **variables,
        }
        return subprocess.Popen(
            ["bash", f"examples/slurm/{script}", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def noted(folder, name):
    deadline = time.monotonic() + 20
    while not (folder / f"{name}.json").exists():
        assert time.monotonic() < deadline, f"nothing was started: {list(folder.iterdir())}"
        time.sleep(0.02)
    return json.loads((folder / f"{name}.json").read_text())


def asked(folder, program):
    path = folder / program
    return path.read_text().splitlines() if path.exists() else []


ARGUMENTS = ["input=[data/a b/*.jsonl.zst]", 'it\'s="x"', "a=$HOME"]


def test_every_node_has_an_agent_of_one_rendezvous(job, tmp_path):
    assert job("run.sbatch", "train", *ARGUMENTS, SLURM_GPUS_ON_NODE="8").wait(20) == 0
    started = noted(tmp_path, "started")
    assert started["arguments"] == [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--nproc-per-node",
        "8",
        "--master-addr",
        "n1",
        "--master-port",
        "14711",
        "tools/train.py",
        *ARGUMENTS,
    ]
    assert started["ignores_the_warning"] and started["path"].split(":")[0] == str(tmp_path)
    assert noted(tmp_path, "srun")["options"] == ["--kill-on-bad-exit=0", "--wait=300"]


def test_a_heterogeneous_job_is_one_world(job, tmp_path):
    ended = job(
        "remote_teacher.sbatch",
        "train",
        SLURM_HET_SIZE="2",
        SLURM_CPUS_PER_TASK="4",
        SLURM_JOB_NODELIST_HET_GROUP_0="n1",
    )
    assert ended.wait(20) == 0
    assert noted(tmp_path, "srun")["options"] == ["--kill-on-bad-exit=0", "--wait=300", "--het-group=0,1"]


def test_a_step_has_the_jobs_cores_and_its_container(job, tmp_path):
    ended = job("run.sbatch", "train", SLURM_CPUS_PER_TASK="64", CONTAINER="nvcr.io#x", MOUNTS="/data:/data")
    assert ended.wait(20) == 0
    options = noted(tmp_path, "srun")["options"]
    assert {
        "--cpus-per-task=64",
        "--container-image=nvcr.io#x",
        f"--container-workdir={tmp_path}",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data",
    } < set(options)


def test_an_array_task_runs_its_line_of_the_file(job, tmp_path):
    (tmp_path / "lines").write_text("input=a output=b\ninput=c output=d\n")
    task = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_CPUS_PER_TASK": "16", "CONTAINER": "image"}
    assert job("array.sbatch", "lines", "tokenize_corpus", "workers=2", SLURM_ARRAY_TASK_ID="1", **task).wait(20) == 0
    assert noted(tmp_path, "started")["arguments"] == ["tools/tokenize_corpus.py", "workers=2", "input=c", "output=d"]
    assert {"--ntasks=1", "--cpus-per-task=16", "--container-image=image"} < set(noted(tmp_path, "srun")["options"])
    late = job("array.sbatch", "lines", "tokenize_corpus", SLURM_ARRAY_TASK_ID="2", **task)
    assert late.wait(20) == 2 and "lines has no line 3" in late.stderr.read()


@pytest.mark.parametrize(
    ("script", "arguments", "said", "name"),
    [
        ("run.sbatch", ["train"], "USR1", "4711"),
        ("run.sbatch", ["score_corpus"], "TERM", "4711"),
        ("array.sbatch", ["lines", "tokenize_corpus"], "TERM", "4700_0"),
    ],
)
def test_a_job_out_of_time_is_requeued(job, tmp_path, script, arguments, said, name):
    """``train`` is told to save; other verbs, which ignore that signal, are terminated.

    An array task is requeued by its own name, since the array's number would requeue every task.
    """
    (tmp_path / "lines").write_text("a=1\n")
    batch = job(script, *arguments, RUNS_FOR="30", SLURM_ARRAY_JOB_ID="4700", SLURM_ARRAY_TASK_ID="0")
    noted(tmp_path, "started")
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(20) == -signal.SIGTERM, "Slurm ends the batch shell"
    assert asked(tmp_path, "scancel") == [f"--signal={said} {name}"]
    assert asked(tmp_path, "scontrol")[-1] == f"requeue {name}"


RECORD = (
    "JobId=4711 EligibleTime=2026-01-01T00:00:00\n StartTime=2026-01-02T10:00:00 EndTime=Unknown\n"
    " PreemptEligibleTime=2026-01-02T10:00:00 PreemptTime={}\n"
)


@pytest.mark.parametrize(
    ("when", "is_requeued"), [("2026-01-02T11:00:00", True), ("None", False), ("2026-01-02T09:59:59", False)]
)
def test_a_failure_is_requeued_only_after_a_preemption_of_this_start(job, tmp_path, when, is_requeued):
    status = job("run.sbatch", "train", ENDS_WITH="3", RECORD=RECORD.format(when)).wait(20)
    assert status == (-signal.SIGTERM if is_requeued else 3)
    assert ("requeue 4711" in asked(tmp_path, "scontrol")) == is_requeued


def test_a_job_that_succeeds_is_not_requeued(job, tmp_path):
    batch = job("run.sbatch", "train", RECORD=RECORD.format("2026-01-02T11:00:00"))
    assert batch.wait(20) == 0 and "requeue 4711" not in asked(tmp_path, "scontrol")
    assert not Path(tmp_path / "scancel").exists()
