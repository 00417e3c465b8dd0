"""``cache_teacher_logits`` killed and started again, also on other ranks, gives the bytes of an undisturbed run."""

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import call_verb
from tests.end_to_end.commands import run
from tests.end_to_end.random_kills import KilledCommand

DRIVER = Path(__file__).with_name("dying_cacher.py")
SETTINGS = ["codec=sampled", "num_draws=16", "micro_batch_size=2", "chunks_per_shard=20", "commit_seconds=0"]
WRITES = 3 * 48  # of a run: records, index and commit of every micro-batch


def settings(dataset, teacher, output):
    return [f"data.path={dataset.path}", f"teacher.path={teacher}", f"output={output}", *SETTINGS]


def finish(arguments, ranks):
    shared_ranks(ranks).run(
        call_verb, "megatron_kd.teachers.cache_teacher_logits", "CacheTeacherLogitsConfig", arguments
    )


@pytest.fixture(scope="module")
def undisturbed(dataset, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("cache") / "whole"
    finish(settings(dataset, teacher, output), 1)
    return output


def check_same_bytes(ours, reference):
    names = sorted(path.name for path in reference.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        if name != "manifest.json":
            assert (ours / name).read_bytes() == (reference / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (ours, reference)]
    for manifest in manifests:
        del manifest["producer"]["config"]["output"], manifest["manifest_sha256"]
    assert manifests[0] == manifests[1]


def survive(dataset, teacher, undisturbed, tmp_path, kills, in_a_write):
    KilledCommand(
        "cache_teacher_logits", DRIVER, WRITES, lambda output: settings(dataset, teacher, output),
        lambda arguments, chance: finish(arguments, ranks=chance.choice([1, 2])),
        lambda output: check_same_bytes(output, undisturbed),
    ).survive(tmp_path, kills, in_a_write)  # fmt: skip


@pytest.mark.slow
def test_two_kills(dataset, teacher, undisturbed, tmp_path):
    survive(dataset, teacher, undisturbed, tmp_path, kills=2, in_a_write=1)


@pytest.mark.slow
def test_twenty_kills(dataset, teacher, undisturbed, tmp_path):
    survive(dataset, teacher, undisturbed, tmp_path, kills=20, in_a_write=8)


def test_a_kill_between_the_manifest_and_the_rename(dataset, teacher, undisturbed, tmp_path):
    """The whole cache lies under its temporary name: the next run gives it its own."""
    output = tmp_path / "cache"
    partial = shutil.copytree(undisturbed, tmp_path / "cache.partial")
    finish(settings(dataset, teacher, output), 1)
    check_same_bytes(output, undisturbed)
    assert not partial.exists()


def test_bytes_behind_a_commit_go_and_damaged_ones_are_made_again(dataset, teacher, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "cache"
    arguments = settings(dataset, teacher, output)
    monkeypatch.setenv("DIE_AT", "70")
    monkeypatch.setenv("DIE_AFTER_BYTES", "9")
    died = run("cache_teacher_logits", *arguments, program=DRIVER)
    assert died.status == -9, died.stderr
    partial = tmp_path / "cache.partial"
    commits = {path.stem: json.loads(path.read_bytes()[64:]) for path in partial.glob("*.part")}
    assert [commit["complete"] for _, commit in sorted(commits.items())] == [True, True, False]
    for number in (0, 2):
        with open(partial / f"knowledge-0000{number}.bin", "r+b") as file:
            file.seek(5)
            file.write(b"\x00\xff\x00")
    finish(arguments, 1)
    check_same_bytes(output, undisturbed)


def test_a_finished_cache_is_left_as_it_is(dataset, teacher, undisturbed):
    before = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    finish(settings(dataset, teacher, undisturbed), 1)
    assert {path.name: path.read_bytes() for path in undisturbed.iterdir()} == before
