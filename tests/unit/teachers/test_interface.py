"""What every teacher has in common: batches in the announced order, and a refusal to do what its placement cannot."""

from types import SimpleNamespace

import pytest

from megatron_kd.errors import DataError, LayoutError
from megatron_kd.teachers.interface import Announced, Teacher


def batches(*keys):
    return [SimpleNamespace(key=key) for key in keys]


def test_equal_batches_are_told_apart_by_their_order():
    step = batches(5, 7, 5)
    announced = Announced(step)
    assert [announced.take(batch) for batch in step] == [0, 1, 2] and announced.is_exhausted


def test_a_batch_out_of_turn_is_refused_with_both_keys():
    announced = Announced(batches(5, 7))
    with pytest.raises(DataError, match="key 0x7, where micro-batch 0 has key 0x5 of the 2 that were announced"):
        announced.take(batches(7)[0])
    assert announced.take(batches(5)[0]) == 0


def test_nothing_is_asked_that_was_not_announced():
    with pytest.raises(DataError, match="none is left of the 0 that were announced"):
        Announced([]).take(batches(5)[0])


def test_a_teacher_that_cannot_generate_says_so():
    class Minimal(Teacher):
        pass

    assert Minimal().follow("decision") is None
    with pytest.raises(LayoutError, match="teacher.placement=colocated"):
        Minimal().decoder("groups", 1, 1, 1)
