"""Every micro-batch goes to exactly one replica; every student interval of the output weight is filled exactly once."""

from collections import Counter
from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron_kd.errors import ConfigError
from megatron_kd.losses import OutputHead, linear_distillation_loss
from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.teachers.routing import Destination, Item, Routing, head_moves, reshard_head


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


ONE_RANK = ParallelLayout(tensor=1, pipeline=1, context=1, data=1)


def resharded(own: OutputHead, student_rows: int) -> OutputHead:
    """On the one rank of a world, where nothing travels."""
    carrier = SimpleNamespace(rank=0, exchange=lambda transfers: None)
    return reshard_head(
        own, Routing(ONE_RANK, ONE_RANK, range(1), range(1)), carrier,
        student_rows=student_rows, teacher_rows=own.weight.shape[0],
        valid_vocab_size=own.valid_vocab_size, hidden_size=own.weight.shape[1], like=own.weight,
    )  # fmt: skip


@pytest.mark.parametrize("student_rows", [128, 384])
def test_a_head_that_moved_is_of_the_ids_that_have_rows_and_has_a_loss_of_its_own(student_rows):
    own = OutputHead(torch.randn(256, 4), 200)
    head = resharded(own, student_rows)
    assert head.valid_vocab_size == min(200, student_rows)
    assert torch.equal(head.weight[:200], own.weight[:200][:student_rows])
    hidden, labels = torch.randn(3, 4), torch.tensor([0, 5, 100])
    output = linear_distillation_loss(hidden, head, labels, torch.ones(3))
    logits = hidden @ own.weight[: head.valid_vocab_size].t()
    torch.testing.assert_close(output.lm_sum, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))


@pytest.mark.parametrize("part", [{"bias": torch.zeros(256)}, {"scale": 0.5}, {"final_softcap": 30.0}])
def test_a_head_with_more_than_a_weight_is_not_moved(part):
    with pytest.raises(ConfigError, match="a bias, a scale or a softcap, which cannot be moved"):
        resharded(OutputHead(torch.zeros(256, 4), 200, **part), 128)


@pytest.mark.parametrize("student_vocabulary", [151_646, 151_936, 152_064])
@pytest.mark.parametrize("teacher_vocabulary", [151_646, 151_936, 152_064])
@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (2, 1), (1, 2), (4, 2), (2, 8)])
def test_every_row_arrives_once(ours, theirs, student_vocabulary, teacher_vocabulary):
    student = ParallelLayout(tensor=ours, pipeline=1, context=1, data=2)
    teacher = ParallelLayout(tensor=theirs, pipeline=1, context=1, data=1)
    student_rows = padded_vocab_size(student_vocabulary, ours) // ours
    teacher_rows = padded_vocab_size(teacher_vocabulary, theirs) // theirs
    plan = Routing(student, teacher, range(100, 100 + 2 * ours), range(theirs))
    filled = numpy.zeros((2 * ours, student_rows), dtype=int)
    for move in head_moves(plan, student_rows, teacher_rows, teacher_vocabulary):
        tensor_rank = (move.destination - 100) % ours
        assert move.source * teacher_rows <= move.start < move.stop <= (move.source + 1) * teacher_rows
        low = tensor_rank * student_rows
        filled[move.destination - 100, move.start - low : move.stop - low] += 1
    for data_rank in range(2):
        rows = filled[data_rank * ours : (data_rank + 1) * ours].reshape(-1)
        shared = min(len(rows), teacher_vocabulary)
        assert (rows[:shared] == 1).all() and not rows[shared:].any()
