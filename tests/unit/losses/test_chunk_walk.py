"""One call of the fused loss: what it holds, where gradients go, what it refuses."""

import gc
import weakref

import pytest
import torch

from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.losses import (
    DenseKnowledge,
    DistillationObjective,
    OutputHead,
    SparseKnowledge,
    linear_distillation_loss,
)
from tests.reference.loss_cases import TARGETS, LossCase, build, whole_knowledge
from tests.reference.loss_runs import assert_agrees, reference
from tests.reference.peak_memory import measure

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("tokens", "vocabulary"), [(512, 4096), (1024, 4096), (512, 8192)])
@pytest.mark.parametrize(
    ("target", "dtype", "teacher_dtype"),
    [("lm", FP32, FP32), ("forward_kl", FP32, FP32), ("jsd", FP32, FP32), ("ghost", FP32, FP32),
     ("0.5*jsd+0.25*reverse_kl+0.25*tvd", FP32, FP32), ("forward_kl", BF16, BF16), ("jsd", BF16, BF16),
     ("jsd", BF16, FP32), ("jsd", FP32, BF16)],
)  # fmt: skip
def test_memory_stays_within_the_byte_budget(target, dtype, teacher_dtype, tokens, vocabulary):
    budget, hidden = 4 << 20, 32
    case = LossCase(target, tokens=tokens, hidden=hidden, teacher_hidden=hidden, rows=vocabulary, vocab=vocabulary,
                    teacher_rows=vocabulary, teacher_vocab=vocabulary, dtype=dtype,
                    teacher_dtype=teacher_dtype)  # fmt: skip
    inputs = build(case)
    hidden_states, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()

    def forward_and_backward():
        linear_distillation_loss(
            hidden_states, OutputHead(weight, vocabulary), inputs.labels, inputs.weights, case.objective,
            whole_knowledge(case, inputs), chunk_bytes=budget,
        ).loss_sum.backward()  # fmt: skip

    used = measure(forward_and_backward)
    gradients = tokens * hidden * dtype.itemsize + vocabulary * hidden * 4  # the weight's is summed in fp32
    per_token = 64 * tokens * 8  # labels, masks, statistics, losses; K = 6 entries of the sparse target
    assert used.peak - gradients <= budget + per_token
    assert used.largest <= max(budget, gradients)


@pytest.mark.parametrize("with_backward", [True, False])
def test_a_loss_frees_what_it_holds_without_the_garbage_collector(with_backward):
    case = LossCase("jsd")
    inputs = build(case)
    kept = [weakref.ref(tensor) for tensor in (inputs.teacher_hidden, inputs.hidden)]
    gc.disable()
    try:
        weight = torch.nn.Parameter(inputs.weight)
        output = linear_distillation_loss(
            inputs.hidden, OutputHead(weight, case.vocab), inputs.labels, inputs.weights, case.objective,
            whole_knowledge(case, inputs),
        )  # fmt: skip
        if with_backward:
            output.loss_sum.backward()
        del inputs, output
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def test_upstream_gradient_scales_and_a_retained_graph_gives_the_same_again():
    inputs = build(LossCase("lm"))
    weight = inputs.weight.clone().requires_grad_()

    def loss():
        return linear_distillation_loss(inputs.hidden, OutputHead(weight, 83), inputs.labels, inputs.weights).loss_sum

    (once,) = torch.autograd.grad(loss(), weight)
    (scaled,) = torch.autograd.grad(3.0 * loss(), weight)
    torch.testing.assert_close(scaled, 3.0 * once)
    value = 3.0 * loss()
    (first,) = torch.autograd.grad(value, weight, retain_graph=True)
    (second,) = torch.autograd.grad(value, weight)
    assert torch.equal(first, scaled) and torch.equal(second, scaled)
    weight.main_grad = torch.zeros_like(weight)
    value = loss()
    value.backward(retain_graph=True)
    torch.testing.assert_close(weight.main_grad, once)
    with pytest.raises(RuntimeError, match="cannot run twice"):
        value.backward()
    torch.testing.assert_close(weight.main_grad, once)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_main_grad_takes_the_declared_scale_in_every_term(target, temperature):
    case = LossCase(target, temperature=temperature)
    inputs = build(case)
    expected = reference(case, inputs)
    hidden, weight = inputs.hidden.clone().requires_grad_(), torch.nn.Parameter(inputs.weight.clone())
    weight.main_grad = torch.zeros_like(weight)
    loss = linear_distillation_loss(
        hidden, OutputHead(weight, case.vocab), inputs.labels, inputs.weights, case.objective,
        whole_knowledge(case, inputs), gradient_scale=8.0,
    ).loss_sum  # fmt: skip
    (8.0 * loss).backward()
    got = {"grad_hidden": hidden.grad / 8, "grad_weight": weight.main_grad / 8}
    assert_agrees(case, got, {key: expected[key] for key in got}, 2e-5)


def small() -> dict:
    inputs = build(LossCase("lm"))
    return {"hidden": inputs.hidden, "head": OutputHead(inputs.weight, 83), "labels": inputs.labels,
            "token_weights": inputs.weights}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(23, 15)}, ConfigError, "size 15 do not fit a head of size 16"),
        ({"hidden": torch.zeros(0, 16)}, ConfigError, "no tokens"),
        ({"labels": torch.zeros(22, dtype=torch.long)}, ConfigError, "labels has 22 tokens"),
        ({"token_weights": torch.zeros(24)}, ConfigError, "token_weights has 24 tokens"),
        ({"objective": DistillationObjective(0.5, 0.5)}, ConfigError, "no teacher knowledge"),
        ({"backend": "cuda"}, ConfigError, "backend must be one of"),
        ({"knowledge": DenseKnowledge(torch.zeros(9, 8), OutputHead(torch.zeros(96, 8), 83))}, ConfigError, "teacher"),
        ({"knowledge": DenseKnowledge(torch.zeros(23, 8), OutputHead(torch.zeros(80, 8), 83))}, LayoutError, "0 to 79"),
        ({"knowledge": SparseKnowledge(torch.zeros(9, 2).long(), torch.zeros(9, 2), torch.zeros(9), "ghost")},
         ConfigError, "9 tokens"),
        ({"head": OutputHead(torch.zeros(96, 16, dtype=torch.int8), 83)}, ConfigError, "floating point"),
        ({"head": OutputHead(torch.zeros(96, 16), 97)}, LayoutError, "96 rows .* a vocabulary of 97"),
        ({"head": OutputHead(torch.zeros(96, 16), 96, vocab_start=8)}, LayoutError, "from id 8 on .* begin at 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_value(change, error, message):
    with pytest.raises(error, match=message):
        linear_distillation_loss(**{**small(), **change})


def test_a_wrong_gradient_scale_is_refused_once_it_has_gone_into_main_grad():
    inputs = small()
    weight = torch.nn.Parameter(inputs["head"].weight)
    weight.main_grad = torch.zeros_like(weight)
    loss = linear_distillation_loss(**{**inputs, "head": OutputHead(weight, 83)}, gradient_scale=8.0).loss_sum
    with pytest.raises(RuntimeError, match="gradient_scale=8.0 was declared"):
        (loss * 4.0).backward()


def test_a_gradient_scale_that_fp32_rounds_is_the_one_that_arrives():
    inputs = small()
    weight = torch.nn.Parameter(inputs["head"].weight)
    weight.main_grad = torch.zeros_like(weight)
    loss = linear_distillation_loss(**{**inputs, "head": OutputHead(weight, 83)}, gradient_scale=0.1).loss_sum
    (loss * 0.1).backward()
    assert weight.main_grad.any()
