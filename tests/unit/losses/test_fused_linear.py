"""The fused loss on one rank: values, gradients, masks, shapes, numerics."""

from dataclasses import replace

import pytest
import torch

from megatron_kd.losses import OutputHead, divergence_from_config, linear_distillation_loss
from tests.reference.loss_cases import TARGETS, LossCase, build, whole_knowledge
from tests.reference.loss_runs import assert_agrees, reference, run_fused

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-5, torch.bfloat16: 3e-2}
DENSE = [target for target in TARGETS if LossCase(target).knowledge_kind == "dense"]
SMOOTH = [target for target in TARGETS if "tvd" not in target]  # TVD has a kink where p = q
SHAPES = {
    "tokens not divisible by the chunk": {},
    "one token": {"tokens": 1, "unmasked": "all"},
    "one chunk": {"chunk_tokens": 100},
    "one token a chunk": {"chunk_tokens": 1},
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
            hidden, head, inputs.labels, inputs.weights, case.objective, whole_knowledge(case, inputs), chunk_bytes=400
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
    assert divergence_from_config("0.25*jsd+2*tvd").name == "mixture"
