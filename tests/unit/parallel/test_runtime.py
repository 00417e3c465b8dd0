"""The world of one: joined and left, seeds, and who reports a failure."""

import contextlib
import errno
import gc
import random
import weakref

import numpy
import pytest
import torch
import torch.distributed as dist

from megatron_kd.errors import DataError, UserError
from megatron_kd.parallel.coordination import on_main_rank
from megatron_kd.parallel.runtime import SplitWorld, distributed_runtime, seed_everything
from tests.reference.one_rank import one_rank_groups


def test_a_world_of_one_is_made_and_left():
    assert not dist.is_initialized()
    with distributed_runtime() as runtime:
        assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
        with distributed_runtime() as inner:
            assert inner == runtime
        assert dist.is_initialized(), "an existing world is left standing"
    assert not dist.is_initialized()


def test_seeds_reach_every_generator():
    with distributed_runtime():
        groups = one_rank_groups()
        drawn = []
        for seed in (3, 3, 4):
            seed_everything(seed, groups)
            drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
        assert drawn[0] == drawn[1]
        assert all(a != b for a, b in zip(drawn[0], drawn[2]))


def test_bad_input_is_marked_for_report_by_the_rank_that_failed_first():
    with pytest.raises(DataError) as caught, distributed_runtime():
        raise DataError("no such dataset")
    assert caught.value.is_reported is False


def test_a_failed_collective_after_a_report_ends_quietly_and_any_other_is_shown():
    with pytest.raises(RuntimeError, match="a fault"), distributed_runtime():
        raise RuntimeError("a fault of the program")
    with pytest.raises(UserError) as caught, distributed_runtime():
        with pytest.raises(DataError), distributed_runtime():
            raise DataError("said by the first")
        raise RuntimeError("connection closed by peer")
    assert caught.value.is_reported is True


def test_work_of_the_main_rank():
    def fail() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/there")

    def fill() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with distributed_runtime():
        assert on_main_rank(lambda: 7) == 7
        with pytest.raises(UserError, match=r"No such file or directory \(/there\)"):
            on_main_rank(fail)
        with pytest.raises(UserError, match="the disk is full while writing the output: free space"):
            on_main_rank(fill)


def test_liveness_does_not_keep_the_bridge(monkeypatch):
    """Its thread may be the last to let go, while the interpreter ends: a process group's end would abort there."""
    kept = []

    class Watch(contextlib.nullcontext):
        def __init__(self, *arguments):
            super().__init__()
            kept.append(arguments)

    class Bridge:
        pass

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name, value in (("get_rank", 0), ("get_world_size", 1), ("destroy_process_group", None)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr("megatron_kd.parallel.runtime.Liveness", Watch)
    world = SplitWorld("student", 0, 1, 2, dist.HashStore(), Bridge())
    monkeypatch.setattr("megatron_kd.parallel.runtime.join_split_world", lambda *_: world)  # noqa: F821
    bridge = weakref.ref(world.bridge)
    with distributed_runtime(teacher_ranks=2) as runtime:
        assert runtime.split is world
    monkeypatch.undo()
    del world, runtime
    gc.collect()
    assert bridge() is None
    (_, _, size, describe, _) = kept[0]
    assert size == 3
    assert [describe(rank) for rank in (0, 2)] == ["rank 0 (student rank 0 of 1)", "rank 2 (teacher rank 1 of 2)"]
