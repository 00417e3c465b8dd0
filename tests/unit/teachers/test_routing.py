"""Every micro-batch goes to exactly one replica, as a pure function that all ranks compute alike."""

from collections import Counter

import pytest

from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.teachers.routing import Item, Routing


def layout(tensor=1, pipeline=1, data=1):
    return ParallelLayout(tensor=tensor, pipeline=pipeline, context=1, data=data)


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
        assert plan.sources(replica) == plan.destinations(item.data_rank)
        for tensor_rank, rank in enumerate(plan.destinations(item.data_rank)):
            assert plan.source_for(replica, rank, tensor_rank) == rank


def test_ranks_of_the_last_stages():
    student, teacher = layout(tensor=2, pipeline=2, data=1), layout(pipeline=2, data=2)
    plan = Routing(student, teacher, range(4), range(4, 8))
    assert plan.destinations(0) == [2, 3]
    assert [plan.sources(replica) for replica in (0, 1)] == [[6], [7]]
    assert plan.source_for(1, 3, 1) == 7


def test_tensor_parallel_sources_share_the_sending():
    plan = Routing(layout(tensor=4), layout(tensor=2), range(4), range(4, 6))
    assert [plan.source_for(0, rank, rank) for rank in range(4)] == [4, 5, 4, 5]


def test_order_is_by_micro_batch_then_rank():
    plan = routing(layout(data=2), layout())
    assert plan.items(range(1, 3)) == [Item(1, 0), Item(1, 1), Item(2, 0), Item(2, 1)]
