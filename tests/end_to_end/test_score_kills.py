"""``score_corpus`` killed and started again, also on other ranks, gives the bits of a run that nobody disturbed."""

import os
import random
import secrets
import subprocess
from pathlib import Path

import numpy
import pytest

from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import call_verb
from tests.end_to_end.commands import kill, run, start

DRIVER = Path(__file__).with_name("dying_scorer.py")
SETTINGS = ["micro_batch_size=2", "chunks_per_unit=4"]


def settings(dataset, teacher, output):
    return [f"data.path={dataset.path}", f"model.path={teacher}", f"output={output}", *SETTINGS]


def finish(arguments, ranks):
    shared_ranks(ranks).run(call_verb, "megatron_kd.scoring.run", "ScoreCorpusConfig", arguments)


@pytest.fixture(scope="module")
def undisturbed(dataset, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("scores") / "whole"
    finish(settings(dataset, teacher, output), 1)
    return (output / "scores.npy").read_bytes()


def die_in_a_write(arguments, chance, monkeypatch):
    monkeypatch.setenv("DIE_AT", str(chance.randint(1, 6)))
    monkeypatch.setenv("DIE_AFTER_BYTES", str(chance.randrange(1 << 16)))
    ended = run("score_corpus", *arguments, program=DRIVER)
    return ended.status == -9


def die_at_any_time(arguments, chance):
    process = start("score_corpus", *arguments)
    try:
        process.wait(chance.uniform(0.5, 8.0))
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        kill(process)


def survive(dataset, teacher, undisturbed, tmp_path, monkeypatch, kills, in_a_write):
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")
    chance, struck, inside, number = random.Random(seed), 0, 0, 0
    while struck < kills:
        output = tmp_path / f"scores{number}"
        number += 1
        arguments = settings(dataset, teacher, output)
        while struck < kills and not output.exists():
            died = die_in_a_write(arguments, chance, monkeypatch) if inside < in_a_write else None
            inside += bool(died)
            struck += bool(died) if died is not None else die_at_any_time(arguments, chance)
        finish(arguments, ranks=chance.choice([1, 2]))
        assert (output / "scores.npy").read_bytes() == undisturbed
        assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.tmp-*"))
    assert inside >= in_a_write


def test_two_kills(dataset, teacher, undisturbed, tmp_path, monkeypatch):
    survive(dataset, teacher, undisturbed, tmp_path, monkeypatch, kills=2, in_a_write=1)


@pytest.mark.slow
def test_twenty_kills(dataset, teacher, undisturbed, tmp_path, monkeypatch):
    survive(dataset, teacher, undisturbed, tmp_path, monkeypatch, kills=20, in_a_write=6)


def test_the_scores_are_finite_and_differ(undisturbed, tmp_path):
    (tmp_path / "scores.npy").write_bytes(undisturbed)
    assert numpy.load(tmp_path / "scores.npy").std() > 0.01
