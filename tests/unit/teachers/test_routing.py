"""Every micro-batch goes to exactly one replica, as a pure function that all ranks compute alike."""

from collections import Counter

import pytest
import torch

from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.teachers.routing import Destination, Item, Routing


def layout(tensor=1, pipeline=1, data=1, context=1):
    return ParallelLayout(tensor=tensor, pipeline=pipeline, context=context, data=data)


def routing(student, teacher):
    return Routing(student, teacher, range(student.world_size), range(teacher.world_size))


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (4, 2), (2, 4), (1, 4), (3, 2), (2, 3)])
def test_replicas_are_in_range_and_evenly_loaded(ours, theirs):
    plan = routing(layout(data=ours), layout(data=theirs))
    load = Counter(plan.replica(step, item, 3) for step in range(12) for item in plan.items(range(3)))
    assert set(load) == set(range(theirs)) and max(load.values()) - min(load.values()) <= 1


def test_equal_layouts_stay_where_they_are():
    plan = routing(layout(tensor=2, pipeline=2, data=2), layout(tensor=2, pipeline=2, data=2))
    for item in plan.items(range(5)):
        replica = plan.replica(7, item, 5)
        assert plan.sources(replica) == [destination.rank for destination in plan.destinations(item.data_rank)]
        for destination in plan.destinations(item.data_rank):
            assert plan.source_for(replica, destination) == destination.rank


def test_ranks_of_the_last_stages():
    student, teacher = layout(tensor=2, pipeline=2, data=1), layout(pipeline=2, data=2)
    plan = Routing(student, teacher, range(4), range(4, 8))
    assert plan.destinations(0) == [Destination(2, 0, 0), Destination(3, 1, 0)]
    assert [plan.sources(replica) for replica in (0, 1)] == [[6], [7]]
    assert plan.source_for(1, Destination(3, 1, 0)) == 7


def test_tensor_parallel_sources_share_the_sending():
    plan = Routing(layout(tensor=4), layout(tensor=2), range(4), range(4, 6))
    assert [plan.source_for(0, destination) for destination in plan.destinations(0)] == [4, 5, 4, 5]


def test_context_parallel_ranks_get_their_own_positions_of_a_replica_that_is_one_of_them():
    plan = routing(layout(context=2, data=2), layout(data=4))
    values = torch.arange(8).view(8, 1)
    for item in plan.items(range(4)):
        replica = plan.replica(3, item, 4)
        destinations = plan.destinations(item.data_rank)
        assert [destination.rank for destination in destinations] == [2 * item.data_rank, 2 * item.data_rank + 1]
        assert plan.sources(replica)[0] in [destination.rank for destination in destinations]
        parts = [plan.part_for(destination, values).flatten().tolist() for destination in destinations]
        assert parts == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_order_is_by_micro_batch_then_rank():
    plan = routing(layout(data=2), layout())
    assert plan.items(range(1, 3)) == [Item(1, 0), Item(1, 1), Item(2, 0), Item(2, 1)]
