"""Work goes to whoever is free: each unit once, ranks of a replica the same ones, a slow replica fewer."""

import time

import pytest
import torch

from megatron_kd.parallel.coordination import WorkQueue
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from tests.distributed.ranks import shared_ranks

UNITS = list(range(100, 130))


def take_units(name: str, keys: dict, slow_rank: int | None) -> tuple[list[int], int]:
    """The units that this rank was given, and how many were handed out in the end."""
    world = torch.distributed.get_world_size()
    groups = create_process_groups(ParallelLayout.for_world(ParallelConfig(**keys), world))
    queue = WorkQueue(UNITS, name, groups, torch.device("cpu"))
    taken = []
    torch.distributed.barrier()
    for unit in queue:
        taken.append(unit)
        time.sleep(0.1 if torch.distributed.get_rank() == slow_rank else 0.002)
    return taken, queue.num_taken()


def test_a_slow_rank_is_given_less():
    (slow, total), (fast, _) = shared_ranks(2).run(take_units, "uneven", {}, 0)
    assert sorted(slow + fast) == UNITS and total == len(UNITS)
    assert 1 <= len(slow) < len(fast) / 2


@pytest.mark.parametrize("keys", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_ranks_of_a_replica_work_together(keys):
    first, second = shared_ranks(2).run(take_units, str(keys), keys, None)
    assert first[0] == second[0] == UNITS
