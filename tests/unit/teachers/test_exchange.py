"""The output weight's rows: every student interval is filled exactly once, whatever the two paddings."""

import numpy
import pytest

from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.teachers.exchange import head_moves
from megatron_kd.teachers.routing import Routing


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
