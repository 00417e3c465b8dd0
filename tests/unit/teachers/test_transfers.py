"""The output weight's rows: every student interval is filled exactly once, whatever the two paddings."""

from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron_kd.errors import ConfigError
from megatron_kd.losses import OutputHead, linear_distillation_loss
from megatron_kd.models.gpt import padded_vocab_size
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.teachers.routing import Routing
from megatron_kd.teachers.transfers import head_moves, reshard_head

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
