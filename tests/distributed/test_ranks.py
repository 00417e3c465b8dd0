"""The worker processes of the distributed tests: results by rank, failures with their traceback, no hang."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankError, Ranks, shared_ranks


def total(value: torch.Tensor, offset: int = 0) -> tuple[int, torch.Tensor]:
    summed = value * (dist.get_rank() + 1) + offset
    dist.all_reduce(summed)
    return dist.get_rank(), summed


def fail_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the value was 17")
    dist.barrier()


def die() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def wait_for_ever() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)


def test_results_come_by_rank_and_the_world_is_reused():
    ranks = shared_ranks(2)
    first = ranks.run(total, torch.ones(2), offset=1)
    assert [rank for rank, _ in first] == [0, 1]
    assert all(torch.equal(summed, torch.full((2,), 5.0)) for _, summed in first)
    again = ranks.run(total, torch.zeros(1))
    assert all(summed.item() == 0 for _, summed in again)


@pytest.mark.parametrize(
    ("function", "message"),
    [(fail_on_one_rank, "the value was 17"), (die, "rank 0 died with exit code 7"), (wait_for_ever, "no answer")],
)
def test_a_failing_rank_ends_the_world_with_its_reason(function, message):
    with Ranks(2) as ranks:
        with pytest.raises(RankError, match=message):
            ranks.run(function, timeout=20 if function is not wait_for_ever else 8)
        assert len(ranks.run(total, torch.ones(1))) == 2  # a fresh world
