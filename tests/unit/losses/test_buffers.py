"""A workspace hands out the same memory again, grows, and changes no result."""

import pytest
import torch

from megatron_kd.losses import OutputHead, Workspace, linear_distillation_loss
from tests.reference.loss_cases import LossCase, build, whole_knowledge

CPU = torch.device("cpu")


def test_the_same_memory_is_handed_out_again_whatever_the_type():
    workspace = Workspace()
    first = workspace.take("student", (8, 16), torch.float32, CPU)
    address = first.data_ptr()
    assert first.shape == (8, 16)
    again = workspace.take("student", (4, 8), torch.bfloat16, CPU)
    assert again.data_ptr() == address and again.shape == (4, 8) and again.dtype == torch.bfloat16
    assert workspace.take("teacher", (4, 8), torch.float32, CPU).data_ptr() != address


def test_it_grows():
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
