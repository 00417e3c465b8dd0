"""A run killed with SIGKILL and started again ends as one never interrupted: the same bits, every step once.

The dataset has 96 chunks and a batch 16, so 8 steps cross the end of an epoch. ``KILL_SEED`` repeats a run.
"""

import os
import random
import secrets
import shutil
import signal
import time

import pytest
import torch

from megatron_kd.errors import DataError
from megatron_kd.metrics.tracker import read_metrics
from tests.end_to_end.commands import SMALL, kill, run, start
from tests.reference.full_state import load_full_state

STEPS = 8
DETERMINED = ("step", "tokens", "loss", "lm_loss", "kd_loss", "grad_norm", "learning_rate")


def settings(objective, dataset, teacher, folder):
    keys = [
        f"data.path={dataset.path}",
        f"output={folder}",
        *SMALL,
        f"training.train_iters={STEPS}",
        "training.save_interval=2",
        "optimizer.lr_warmup_iters=2",
    ]
    if objective == "vanilla_kd":
        keys += ["distillation.method=vanilla_kd", "teacher.placement=colocated", f"teacher.path={teacher}"]
    return keys


@pytest.fixture(scope="module")
def uninterrupted(dataset, teacher, tmp_path_factory):
    """The run folder of each objective's whole run, made at first use."""
    folders = {}

    def folder(objective):
        if objective not in folders:
            path = tmp_path_factory.mktemp(objective) / "run"
            ended = run("train", *settings(objective, dataset, teacher, path))
            assert ended.status == 0, ended.stderr
            folders[objective] = path
        return folders[objective]

    return folder


def rows_of(folder):
    try:
        return len(read_metrics(folder))
    except DataError:  # not written yet
        return 0


def unfinished_save(process, folder):
    """Whether what is on disk tells of a save that this process began and did not finish."""
    return any((folder / "checkpoints").glob(f"step_*.tmp-{process.pid}-*"))


def wait_for_moment(process, folder, in_a_save, chance):
    """Until a random moment, in a save or anywhere; True if the process still runs."""
    first, wanted, pause = rows_of(folder), chance.randint(0, 3), chance.uniform(0, 0.6)
    while process.poll() is None and not (
        unfinished_save(process, folder) if in_a_save else rows_of(folder) >= first + wanted
    ):
        time.sleep(0.002)
    time.sleep(pause / 10 if in_a_save else pause)
    return process.poll() is None


def strike(arguments, folder, in_a_save, chance):
    """Start the run and kill it once; whether that found it alive, and whether it found it in a save."""
    process = start("train", *arguments)
    try:
        alive = wait_for_moment(process, folder, in_a_save, chance)
        assert alive or process.returncode == 0, process.stderr.read()
    finally:
        kill(process)
    struck = process.returncode == -signal.SIGKILL
    return struck, struck and unfinished_save(process, folder)


def check_same_end(ours, reference):
    _, state, manifest = load_full_state(ours)
    _, expected, other = load_full_state(reference)
    assert state.keys() == expected.keys() and manifest["progress"]["step"] == other["progress"]["step"] == STEPS
    assert manifest["progress"]["tokens"] == other["progress"]["tokens"]
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    rows, expected_rows = read_metrics(ours), read_metrics(reference)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, other_row in zip(rows, expected_rows, strict=True):
        assert {key: row[key] for key in DETERMINED} == {key: other_row[key] for key in DETERMINED}
    assert len({row["loss"] for row in expected_rows}) == STEPS, "the comparison needs losses that change"


def survive(objective, kills, kills_in_a_save, dataset, teacher, uninterrupted, tmp_path):
    """Kill runs until so many kills have struck, so many of them in a save; each run must end as the whole one did.

    A run of 8 steps is done after a few kills: another one follows. Starts without a kill are few: a process that
    ends before its moment is one that had little left to do.
    """
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")
    chance, struck, in_a_save, starts = random.Random(seed), 0, 0, 0
    while struck < kills or in_a_save < kills_in_a_save:
        folder = tmp_path / f"run{starts}"
        arguments = settings(objective, dataset, teacher, folder)
        for _ in range(4):
            starts += 1
            assert starts <= 5 * kills, f"{struck} kills struck, {in_a_save} in a save, of {starts} starts"
            hit, hit_in_a_save = strike(arguments, folder, chance.random() < 0.75, chance)
            struck, in_a_save = struck + hit, in_a_save + hit_in_a_save
            if not hit or (struck >= kills and in_a_save >= kills_in_a_save):
                break
        ended = run("train", *arguments)
        assert ended.status == 0, ended.stderr
        assert not any((folder / "checkpoints").glob("*.tmp-*")), "what killed writers left is gone"
        check_same_end(folder, uninterrupted(objective))
    print(f"{struck} kills in {starts} starts, {in_a_save} of them in a save")


@pytest.mark.parametrize("objective", ["lm", pytest.param("vanilla_kd", marks=pytest.mark.slow)])
def test_two_kills(objective, dataset, teacher, uninterrupted, tmp_path):
    survive(objective, 2, 1, dataset, teacher, uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["lm", "vanilla_kd"])
def test_twenty_kills(objective, dataset, teacher, uninterrupted, tmp_path):
    survive(objective, 20, 5, dataset, teacher, uninterrupted, tmp_path)


def test_a_damaged_newest_checkpoint_costs_its_steps_only(dataset, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted("lm"), tmp_path / "run")
    arguments = settings("lm", dataset, None, folder)
    newest = folder / "checkpoints" / f"step_{STEPS}"
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    ended = run("train", *arguments)
    assert ended.status == 0, ended.stderr
    assert sum("skipping a damaged checkpoint, resuming from step_6" in line for line in ended.lines) == 1
    check_same_end(folder, uninterrupted("lm"))


def test_a_finished_run_is_left_as_it_is(uninterrupted, dataset, teacher):
    folder = uninterrupted("lm")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ended = run("train", *settings("lm", dataset, teacher, folder))
    assert ended.status == 0 and "resumed at step 8" in ended.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
