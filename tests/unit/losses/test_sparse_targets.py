"""Sparse targets: unbiasedness, the tail bucket, and what absent entries mean."""

from dataclasses import replace

import pytest
import torch

from megatron_kd.errors import ConfigError
from megatron_kd.losses import DistillationObjective, OutputHead, SparseKnowledge, linear_distillation_loss
from tests.reference.loss_cases import LossCase, build
from tests.reference.loss_runs import assert_agrees, reference, run_fused

VOCABULARY = 6


def logit_gradient(logits: torch.Tensor, knowledge: SparseKnowledge) -> tuple[torch.Tensor, torch.Tensor]:
    """(KD sum, its gradient by the logits [n, V]), float64."""
    leaf = logits.clone().requires_grad_()
    n, vocabulary = logits.shape
    output = linear_distillation_loss(
        leaf, OutputHead(torch.eye(vocabulary, dtype=torch.float64), vocabulary), torch.zeros(n, dtype=torch.long),
        torch.ones(n), DistillationObjective(0.0, 1.0), knowledge,
    )  # fmt: skip
    output.loss_sum.backward()
    return output.kd_sum, leaf.grad


def sparse(ids: list[list[int]], weights: list[list[float]], tail: list[float], kind: str) -> SparseKnowledge:
    return SparseKnowledge(torch.tensor(ids), torch.tensor(weights), torch.tensor(tail), kind)


@pytest.fixture
def student() -> torch.Tensor:
    return torch.tensor([[0.3, -1.0, 2.0, 0.0, 0.5, -0.7]], dtype=torch.float64)


TEACHER = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)


def test_sampled_counts_are_unbiased_by_enumeration(student):
    expected = torch.zeros_like(student)
    for first in range(VOCABULARY):
        for second in range(VOCABULARY):
            counts = torch.zeros(VOCABULARY)
            counts[first] += 0.5
            counts[second] += 0.5
            ids = [i for i in range(VOCABULARY) if counts[i] > 0]
            knowledge = sparse([ids], [[counts[i].item() for i in ids]], [0.0], "sampled")
            expected += TEACHER[first] * TEACHER[second] * logit_gradient(student, knowledge)[1]
    torch.testing.assert_close(expected, student.softmax(-1) - TEACHER, rtol=0, atol=1e-9)


def test_weighted_draws_are_unbiased_by_enumeration_and_renormalised_ones_are_not(student):
    proposal = TEACHER**0.5 / (TEACHER**0.5).sum()
    unbiased, biased = torch.zeros_like(student), torch.zeros_like(student)
    for drawn in range(VOCABULARY):
        weight = [[(TEACHER[drawn] / proposal[drawn]).item()]]
        unbiased += proposal[drawn] * logit_gradient(student, sparse([[drawn]], weight, [0.0], "weighted"))[1]
        biased += proposal[drawn] * logit_gradient(student, sparse([[drawn]], weight, [0.0], "renormalised"))[1]
    full = student.softmax(-1) - TEACHER
    torch.testing.assert_close(unbiased, full, rtol=0, atol=1e-6)
    assert (biased - full).abs().max() > 0.05


def test_ghost_with_all_ids_is_the_forward_kl_and_gives_the_tail_one_bucket(student):
    ids = list(range(VOCABULARY))
    value, gradient = logit_gradient(student, sparse([ids], [TEACHER.tolist()], [0.0], "ghost"))
    kl = (TEACHER * (TEACHER.log() - student.log_softmax(-1)[0])).sum()
    torch.testing.assert_close(value, kl, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, student.softmax(-1) - TEACHER, rtol=0, atol=1e-6)

    value, gradient = logit_gradient(student, sparse([[0, 1]], [[0.4, 0.3]], [0.3], "ghost"))
    q = student.softmax(-1)[0]
    inside = q[0] + q[1]
    bucketed = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    torch.testing.assert_close(
        value, (bucketed * (bucketed / torch.stack([q[0], q[1], 1 - inside])).log()).sum(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(gradient[0, :2], q[:2] - bucketed[:2], rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient[0, 2:], q[2:] * (0.7 - inside) / (1 - inside), rtol=0, atol=1e-6)


def test_ghost_gradient_is_exact_where_the_student_has_almost_no_tail():
    """1 - Q formed by subtraction would be 0 here, in fp32."""
    logits = torch.tensor([[20.0, 19.0, 0.0, 1.0, -1.0, 0.5]])
    leaf = logits.clone().requires_grad_()
    knowledge = sparse([[0, 1]], [[0.6, 0.3]], [0.1], "ghost")
    linear_distillation_loss(
        leaf, OutputHead(torch.eye(6), 6), torch.zeros(1, dtype=torch.long), torch.ones(1),
        DistillationObjective(0.0, 1.0), knowledge,
    ).loss_sum.backward()  # fmt: skip
    _, exact = logit_gradient(logits.double(), knowledge)
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=1e-7)


def test_absent_entries_and_ids_beyond_the_vocabulary_do_not_matter():
    case = LossCase("sampled", rows=64, vocab=61, teacher_vocab=61)
    inputs = build(case)
    expected = run_fused(case, inputs)
    known = inputs.sparse
    beyond = torch.full_like(known.ids[:, :1], 62)
    more = replace(
        known, ids=torch.cat([known.ids, beyond], 1), weights=torch.cat([known.weights, torch.ones(beyond.shape)], 1)
    )
    got = run_fused(case, replace(inputs, sparse=more))
    for key in ("kd_sum", "grad_hidden", "grad_weight"):
        assert torch.equal(got[key], expected[key])


def test_no_entry_at_all_gives_zero_and_no_nan():
    for kind in ("sampled", "weighted", "renormalised"):
        value, gradient = logit_gradient(
            torch.randn(1, 6, dtype=torch.float64), sparse([[-1, -1]], [[0.5, 0.5]], [1.0], kind)
        )
        assert value.item() == 0 and not gradient.any()


@pytest.mark.parametrize("kind", ["ghost", "renormalised", "sampled", "weighted"])
def test_few_and_many_entries(kind):
    for entries in (1, 40):
        case = LossCase(kind, entries=entries)
        inputs = build(case)
        assert_agrees(case, run_fused(case, inputs), reference(case, inputs), 2e-5)


def test_malformed_knowledge_is_refused():
    with pytest.raises(ConfigError, match="must be one of ghost"):
        sparse([[0]], [[1.0]], [0.0], "top_k")
    with pytest.raises(ConfigError, match="tail_mass"):
        sparse([[0]], [[1.0]], [0.0, 0.0], "ghost")
