"""The fused loss on one rank: values, gradients, masks, shapes, numerics, memory, and the input that it refuses."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.losses import (
    DenseKnowledge,
    DistillationObjective,
    OutputHead,
    SparseKnowledge,
    linear_distillation_loss,
    tile_buffers,
)
from tests.reference.loss_cases import TARGETS, LossCase, build, whole_knowledge
from tests.reference.loss_runs import assert_agrees, reference, run_fused
from tests.reference.peak_memory import measure

BF16, FP32 = torch.bfloat16, torch.float32
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-5, torch.bfloat16: 3e-2}
DENSE = [target for target in TARGETS if LossCase(target).knowledge_kind == "dense"]
SMOOTH = [target for target in TARGETS if "tvd" not in target]  # TVD has a kink where p = q
SHAPES = {
    "tokens not divisible by the tile": {},
    "one token": {"tokens": 1, "unmasked": "all"},
    "one tile": {"tile_tokens": 100},
    "one token per tile": {"tile_tokens": 1},
    "no padding, odd vocabulary": {"rows": 83, "teacher_rows": 83},
    "teacher padded further": {"rows": 96, "teacher_rows": 128},
    "ids that only the student has": {"teacher_rows": 64, "teacher_vocab": 61},
    "ids that only the teacher has": {"rows": 64, "vocab": 61},
    "temperature": {"temperature": 2.5},
    "temperature squared": {"temperature": 0.7, "temperature_squared": True},
    "softcap, scale and bias": {"softcap": 3.0, "teacher_softcap": 4.0, "scale": 0.8, "bias": True},
    "softcap and temperature, ids that only the student has": {
        "softcap": 3.0,
        "temperature": 2.0,
        "teacher_rows": 64,
        "teacher_vocab": 61,
    },
    "the teacher's bias and scale": {"teacher_bias": True, "teacher_scale": 1.3},
    "kd alone": {"lm_weight": 0.0, "kd_weight": 1.0},
}


def compare(case: LossCase, tolerance: float) -> None:
    inputs = build(case)
    expected = reference(case, inputs)
    assert_agrees(case, run_fused(case, inputs), expected, tolerance)
    forward_only = run_fused(case, inputs, gradients=False)
    assert_agrees(case, forward_only, {k: v for k, v in expected.items() if not k.startswith("grad")}, tolerance)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(target, dtype, shape):
    case = LossCase(target, dtype=dtype, **SHAPES[shape])
    compare(case, TOLERANCE[dtype] * (3 if dtype == torch.bfloat16 and case.softcap else 1))


@pytest.mark.parametrize("target", TARGETS)
def test_float64_is_exact(target):
    compare(LossCase(target, dtype=torch.float64, temperature=1.5), 1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fully_masked_gives_zeros(target, temperature):
    case = LossCase(target, unmasked="none", temperature=temperature)
    got = run_fused(case, build(case))
    assert got["loss_sum"].item() == 0 and got["lm_sum"].item() == 0 and got["token_count"].item() == 0
    assert not got["grad_hidden"].any() and not got["grad_weight"].any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_of_ten_thousand_stay_finite(target, temperature):
    case = LossCase(target, logit_size=4e3, temperature=temperature)
    inputs = build(case)
    assert (inputs.hidden @ inputs.weight.t()).abs().max() > 1e4
    got, expected = run_fused(case, inputs), reference(case, inputs)
    assert all(value is None or torch.isfinite(value).all() for value in got.values())
    if target != "ghost":  # whose student tail underflows in fp32: finite, cut at SMALLEST_TAIL
        assert_agrees(case, got, {k: expected[k] for k in ("loss_sum", "lm_sum", "kd_sum")}, 1e-5)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("target", DENSE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_id_whose_bias_is_minus_infinity_has_probability_zero(target, temperature, side):
    """Exact, but for the two that are infinite there: KL(q || p) where p = 0, KL(p || q) where q = 0."""
    case = LossCase(target, temperature=temperature, bias=True, teacher_bias=True)
    inputs = build(case)
    (inputs.teacher_bias if side == "teacher" else inputs.bias)[3] = -torch.inf
    inputs.labels[inputs.labels == 3] = 4
    got = run_fused(case, inputs)
    infinite = "reverse_kl" if side == "teacher" else "forward_kl"
    if any(part.partition("*")[2] == infinite or part == infinite for part in target.split("+")):
        assert all(value is None or torch.isfinite(value).all() for value in got.values())
        assert got["kd_sum"] > 100
    else:
        assert_agrees(case, got, reference(case, inputs), 2e-5)


@pytest.mark.parametrize("softcap", [2.0, None])
@pytest.mark.parametrize("target", SMOOTH)
def test_gradients_of_the_fp64_loss_pass_gradcheck(target, softcap):
    case = LossCase(target, tokens=5, hidden=4, rows=11, vocab=9, teacher_rows=11, teacher_vocab=9,
                    dtype=torch.float64, entries=3, softcap=softcap, temperature=1.7 if softcap else 1.0)  # fmt: skip
    inputs = build(case)

    def loss(hidden, weight):
        head = OutputHead(weight, case.vocab, final_softcap=case.softcap)
        return linear_distillation_loss(
            hidden, head, inputs.labels, inputs.weights, case.objective, whole_knowledge(case, inputs), tile_bytes=400
        ).loss_sum

    leaves = (inputs.hidden.requires_grad_(), inputs.weight.requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("target", ["forward_kl", "jsd"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16),
     (torch.float32, torch.float64), (torch.float64, torch.float32)],
)  # fmt: skip
def test_heads_of_different_dtypes(target, student, teacher):
    case = LossCase(target, dtype=student, teacher_dtype=teacher, temperature=1.5)
    compare(case, 3e-2 if torch.bfloat16 in (student, teacher) else 2e-5)


def test_masked_tokens_and_padding_rows_get_exactly_no_gradient():
    case = LossCase("jsd")
    inputs = build(case)
    got = run_fused(case, inputs)
    assert not got["grad_hidden"][inputs.weights == 0].any()
    assert not got["grad_weight"][case.vocab :].any()
    assert got["grad_weight"][: case.vocab].any()


def test_micro_batches_with_unequal_masks_add_up():
    case = LossCase("forward_kl", tokens=30)
    inputs = build(case)
    whole = run_fused(case, inputs)
    parts = []
    for rows in (slice(0, 4), slice(4, 30)):
        part = replace(inputs, hidden=inputs.hidden[rows], teacher_hidden=inputs.teacher_hidden[rows],
                       labels=inputs.labels[rows], weights=inputs.weights[rows])  # fmt: skip
        parts.append(run_fused(case, part))
    assert sum(p["token_count"] for p in parts) == whole["token_count"]
    torch.testing.assert_close(sum(p["loss_sum"] for p in parts), whole["loss_sum"], rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(p["grad_weight"] for p in parts), whole["grad_weight"], rtol=1e-4, atol=1e-5)


def test_three_dimensional_hidden_states_are_flattened_sequence_first():
    case = LossCase("forward_kl", tokens=24)
    inputs = build(case)
    flat = run_fused(case, inputs)
    shaped = run_fused(case, replace(inputs, hidden=inputs.hidden.view(8, 3, -1), labels=inputs.labels.view(8, 3)))
    assert shaped["grad_hidden"].shape == (8, 3, case.hidden)
    assert torch.equal(shaped["loss_sum"], flat["loss_sum"])


def test_forward_only_gives_token_losses_and_training_does_not():
    case = LossCase("lm")
    inputs = build(case)
    assert run_fused(case, inputs)["token_lm_losses"] is None
    got = run_fused(case, inputs, gradients=False)
    assert got["token_lm_losses"].shape == (case.tokens,)
    assert not got["token_lm_losses"][inputs.weights == 0].any()
    with torch.no_grad():
        parameter = torch.nn.Parameter(inputs.weight)
        output = linear_distillation_loss(
            inputs.hidden, OutputHead(parameter, case.vocab), inputs.labels, inputs.weights
        )
    torch.testing.assert_close(output.token_lm_losses, got["token_lm_losses"])


def test_a_frozen_head_or_frozen_hidden_states_get_no_gradient():
    case = LossCase("lm")
    inputs = build(case)
    hidden = inputs.hidden.clone().requires_grad_()
    linear_distillation_loss(
        hidden, OutputHead(inputs.weight, case.vocab), inputs.labels, inputs.weights
    ).loss_sum.backward()
    weight = inputs.weight.clone().requires_grad_()
    linear_distillation_loss(
        inputs.hidden, OutputHead(weight, case.vocab), inputs.labels, inputs.weights
    ).loss_sum.backward()
    both = run_fused(replace(case, lm_weight=1.0), inputs)
    torch.testing.assert_close(hidden.grad, both["grad_hidden"])
    torch.testing.assert_close(weight.grad, both["grad_weight"])


def test_an_unmasked_label_that_the_student_does_not_have_is_an_infinite_loss():
    case = LossCase("lm", unmasked="all")
    inputs = build(case)
    inputs.labels[2] = case.vocab  # a padding row
    assert run_fused(case, inputs)["loss_sum"].item() == float("inf")


def test_a_term_without_weight_does_not_count_however_large():
    """A label that the student does not have is an infinite LM loss, which distillation alone does not ask for."""
    case = LossCase("forward_kl", unmasked="all", lm_weight=0.0, kd_weight=1.0)
    inputs = build(case)
    inputs.labels[2] = case.vocab
    got = run_fused(case, inputs)
    assert torch.equal(got["loss_sum"], got["kd_sum"]) and torch.isfinite(got["loss_sum"])
    assert got["lm_sum"].item() == float("inf")


def test_mixture_objective_is_the_weighted_sum_of_its_parts():
    case = LossCase("forward_kl", lm_weight=0.0, kd_weight=1.0)
    inputs = build(case)
    parts = {name: run_fused(replace(case, target=name), inputs) for name in ("jsd", "tvd")}
    mixed = run_fused(replace(case, target="0.25*jsd+2*tvd"), inputs)
    for key in ("loss_sum", "grad_hidden", "grad_weight"):
        torch.testing.assert_close(mixed[key], 0.25 * parts["jsd"][key] + 2 * parts["tvd"][key])


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
            whole_knowledge(case, inputs), tile_bytes=budget,
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


def test_the_buffers_of_tiles_are_freed_before_the_backward_pass(monkeypatch):
    allocated, allocate = [], tile_buffers.allocate

    def recording(*arguments):
        buffer = allocate(*arguments)
        allocated.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(tile_buffers, "allocate", recording)
    case = LossCase("jsd")
    inputs = build(case)
    output = linear_distillation_loss(
        inputs.hidden.requires_grad_(), OutputHead(inputs.weight, case.vocab), inputs.labels, inputs.weights,
        case.objective, whole_knowledge(case, inputs),
    )  # fmt: skip
    assert output.loss_sum.requires_grad and len(allocated) == 2
    assert [buffer() for buffer in allocated] == [None, None]


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
