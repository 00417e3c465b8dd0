"""The byte budget of a tile, its dtypes, and the workspace that keeps its buffers for the next call."""

import pytest
import torch

from megatron_kd.losses import OutputHead, Workspace, linear_distillation_loss
from megatron_kd.losses.tile_buffers import TileDtypes, TilePlan, bytes_per_logit
from tests.reference.loss_cases import LossCase, build, whole_knowledge

CPU = torch.device("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("weights", "kernels", "by_block", "stored", "evaluated", "size"),
    [
        ((FP32, FP32), False, True, FP32, FP32, 4 + 4),
        ((FP32,), True, True, FP32, FP32, 4),
        ((BF16, BF16), False, True, BF16, FP32, 2 + 2),
        ((BF16, BF16), False, False, FP32, FP32, 4 + 4 + 2),
        ((BF16, BF16), True, False, BF16, BF16, 2 + 2),
        ((BF16, FP32), True, True, FP32, FP32, 4 + 4 + 2),
        ((FP32, BF16), True, True, FP32, FP32, 4 + 4 + 2),
        ((BF16, FP16), True, True, FP32, FP32, 4 + 4 + 2),
        ((FP32, FP64), False, True, FP64, FP64, 8 + 8 + 4),
    ],
)
def test_dtypes_of_a_tile_and_its_bytes_per_logit(weights, kernels, by_block, stored, evaluated, size):
    dtypes = TileDtypes.of(weights, kernels_read_narrow=kernels, widens_by_block=by_block)
    assert dtypes == TileDtypes(stored, evaluated)
    assert bytes_per_logit(weights, stored) == size


def test_a_budget_is_spread_evenly_over_the_tiles():
    plan = TilePlan.of(budget=8 << 20, tokens=100, rows=1 << 14, number_bytes=4, logit_bytes=8)
    assert plan.temporary_bytes == 2 << 20
    assert plan.tokens == 34  # 48 fit, so there are three tiles
    assert plan.block_elements * 8 * 4 == plan.temporary_bytes


def test_a_tile_has_one_token_at_least_and_temporaries_have_a_limit():
    assert TilePlan.of(budget=1, tokens=5, rows=1 << 14, number_bytes=4, logit_bytes=8) == TilePlan(1, 1, 0)
    assert TilePlan.of(budget=1 << 40, tokens=5, rows=1, number_bytes=4, logit_bytes=8).temporary_bytes == 32 << 20


def test_a_workspace_reuses_its_memory_for_every_dtype():
    workspace = Workspace()
    first = workspace.take("student", (8, 16), torch.float32, CPU)
    address = first.data_ptr()
    assert first.shape == (8, 16)
    again = workspace.take("student", (4, 8), torch.bfloat16, CPU)
    assert again.data_ptr() == address and again.shape == (4, 8) and again.dtype == torch.bfloat16
    assert workspace.take("teacher", (4, 8), torch.float32, CPU).data_ptr() != address


def test_a_workspace_grows():
    workspace = Workspace()
    workspace.take("student", (2, 2), torch.float32, CPU)
    larger = workspace.take("student", (64, 64), torch.float32, CPU)
    larger.fill_(1.0)
    assert larger.sum() == 64 * 64


@pytest.mark.parametrize("target", ["lm", "forward_kl", "jsd"])
def test_a_loss_is_the_same_with_buffers_that_were_used_before(target):
    workspace = Workspace()
    workspace.take("student", (100, 100), torch.float32, CPU).fill_(torch.nan)
    workspace.take("teacher", (100, 100), torch.float32, CPU).fill_(torch.nan)
    case = LossCase(target)
    results = []
    for kept in (None, workspace, workspace):
        inputs = build(case)
        weight, hidden = inputs.weight.clone().requires_grad_(), inputs.hidden.clone().requires_grad_()
        output = linear_distillation_loss(
            hidden, OutputHead(weight, case.vocab), inputs.labels, inputs.weights, case.objective,
            whole_knowledge(case, inputs), workspace=kept,
        )  # fmt: skip
        output.loss_sum.backward()
        results.append((output.loss_sum.detach(), hidden.grad, weight.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
