"""A run killed with SIGKILL and started again ends as one never interrupted: the same bits, every step once.

The dataset has 96 chunks and a batch 16, so 8 steps cross the end of an epoch. ``KILL_SEED`` repeats a run.
"""

import os
import random
import secrets
import shutil
import time

import pytest
import torch

from megatron_kd.metrics.tracker import read_metrics
from megatron_kd.training.checkpoint import load_full_state
from tests.end_to_end.commands import SMALL, kill, run, start

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
    except FileNotFoundError:
        return 0


def wait_for_moment(process, folder, chance):
    """Until a random moment: within a save three times of four, else between; True if the process still runs."""
    in_a_save, first, pause = chance.random() < 0.75, rows_of(folder), chance.uniform(0, 0.6)
    wanted, seen = chance.randint(1, 3), set((folder / "checkpoints").glob("*.tmp-*"))
    while process.poll() is None:
        if in_a_save and set((folder / "checkpoints").glob("*.tmp-*")) - seen:
            break
        if not in_a_save and rows_of(folder) >= first + wanted:
            break
        time.sleep(0.005)
    time.sleep(pause / 10 if in_a_save else pause)
    return process.poll() is None


def train_under_fire(arguments, folder, kills, chance):
    """Start and kill until ``kills`` have struck, then let it end; how many struck, and how many of them in a save."""
    struck = in_a_save = 0
    while struck < kills:
        process = start("train", *arguments)
        try:
            if not wait_for_moment(process, folder, chance):
                assert process.returncode == 0, process.stderr.read()
                break
            struck += 1
        finally:
            kill(process)
        in_a_save += any((folder / "checkpoints").glob("*.tmp-*"))  # what a writer that was killed leaves behind
    ended = run("train", *arguments)
    assert ended.status == 0, ended.stderr
    assert not any((folder / "checkpoints").glob("*.tmp-*"))
    return struck, in_a_save


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


def survive(objective, kills, dataset, teacher, uninterrupted, tmp_path):
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")
    folder = tmp_path / "run"
    struck, _ = train_under_fire(settings(objective, dataset, teacher, folder), folder, kills, random.Random(seed))
    assert struck > 0
    check_same_end(folder, uninterrupted(objective))


@pytest.mark.parametrize("objective", ["lm", pytest.param("vanilla_kd", marks=pytest.mark.slow)])
def test_two_kills(objective, dataset, teacher, uninterrupted, tmp_path):
    survive(objective, 2, dataset, teacher, uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["lm", "vanilla_kd"])
def test_twenty_kills(objective, dataset, teacher, uninterrupted, tmp_path):
    """A run is done after a few kills, so runs follow one another until twenty have struck."""
    seed, struck, in_a_save = int(os.environ.get("KILL_SEED", secrets.randbits(32))), 0, 0
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)
    for number in range(20):
        folder = tmp_path / f"run{number}"
        more = train_under_fire(settings(objective, dataset, teacher, folder), folder, 20 - struck, chance)
        struck, in_a_save = struck + more[0], in_a_save + more[1]
        check_same_end(folder, uninterrupted(objective))
        if struck >= 20:
            print(f"{struck} kills, {in_a_save} of them in a save")
            assert in_a_save >= 5
            return
    raise AssertionError(f"only {struck} kills struck")


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
    assert sum("damaged checkpoint is passed over, going on from step_6" in line for line in ended.lines) == 1
    check_same_end(folder, uninterrupted("lm"))


def test_a_finished_run_is_left_as_it_is(uninterrupted, dataset, teacher):
    folder = uninterrupted("lm")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ended = run("train", *settings("lm", dataset, teacher, folder))
    assert ended.status == 0 and "resumed at step 8" in ended.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
