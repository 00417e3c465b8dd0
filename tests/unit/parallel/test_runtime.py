"""The world of one: joined and left, seeds, and who reports a failure."""

import errno
import random

import numpy
import pytest
import torch
import torch.distributed as dist

from megatron_kd.errors import DataError, UserError
from megatron_kd.parallel.agreement import on_main_rank
from megatron_kd.parallel.runtime import distributed_runtime, seed_everything
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
