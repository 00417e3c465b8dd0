"""Runs with a cached and with a remote teacher, killed and signalled: the same command goes on to the same bits."""

import os
import random
import secrets
import signal
import time

import pytest
import torch

from megatron_kd.errors import DataError
from megatron_kd.metrics.tracker import read_metrics
from tests.end_to_end.commands import SMALL, kill, run, start_ranks
from tests.reference.full_state import load_full_state

STEPS = 40
DETERMINED = ("step", "tokens", "loss", "lm_loss", "kd_loss", "grad_norm")


@pytest.fixture(scope="module")
def cache(dataset, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("cache") / "cache"
    ended = run("cache_teacher_logits", f"data.path={dataset.path}", f"teacher.path={teacher}", f"output={output}")
    assert ended.status == 0, ended.stderr
    return output


def placement_keys(placement, teacher, cache):
    if placement == "cached":
        return 1, ["teacher.placement=cached", f"teacher.cache_path={cache}"]
    remote = ["teacher.placement=remote", f"teacher.path={teacher}", "teacher.num_ranks=1", "teacher.prefetch_depth=3"]
    return 2, [*remote, f"teacher.payload={'hidden' if placement == 'remote' else placement}"]


def rows_of(folder):
    try:
        return len(read_metrics(folder))
    except DataError:  # not written yet
        return 0


def until_rows(processes, folder, count, tmp_path):
    deadline = time.monotonic() + 240
    while rows_of(folder) < count:
        assert all(process.poll() is None for process in processes), words(tmp_path)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ends(processes, seconds=240):
    """Exit statuses by rank."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            kill(process)


def words(folder):
    """What all ranks had to say."""
    return "".join(path.read_text() for path in sorted(folder.glob("stderr-*")))


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["cached", "remote", "sampled"])
def test_killed_and_signalled_runs_end_with_the_bits_of_a_whole_one(placement, dataset, teacher, cache, tmp_path):
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)
    ranks, keys = placement_keys(placement, teacher, cache)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    common = [f"data.path={dataset.path}", *SMALL, f"training.train_iters={STEPS}", "training.save_interval=5",
              "training.micro_batch_size=4", "distillation.method=vanilla_kd", *keys]  # fmt: skip

    def begin(output):
        return start_ranks("train", *common, f"output={output}", ranks=ranks, logs=tmp_path)

    assert ends(begin(whole)) == [0] * ranks, words(tmp_path)

    processes = begin(folder)
    until_rows(processes, folder, chance.randint(6, 15), tmp_path)
    time.sleep(chance.uniform(0, 0.05))
    for process in processes:
        kill(process)

    processes = begin(folder)
    until_rows(processes, folder, chance.randint(17, 25), tmp_path)
    processes[0].send_signal(signal.SIGUSR1)
    assert ends(processes)[0] == 75, words(tmp_path)
    assert "told to stop: step" in (tmp_path / "stderr-0").read_text() and rows_of(folder) < STEPS

    assert ends(begin(folder)) == [0] * ranks, words(tmp_path)
    assert "resumed at step" in words(tmp_path)
    (_, ours, _), (_, expected, _) = load_full_state(folder), load_full_state(whole)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert [[row[key] for key in DETERMINED] for row in read_metrics(folder)] == [
        [row[key] for key in DETERMINED] for row in read_metrics(whole)
    ]
