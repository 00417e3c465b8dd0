"""The fused loss on a GPU, both backends, against the float64 reference on the CPU: skipped where there is no GPU.

``triton_path.VERIFIED_ON_CUDA`` becomes True with a recorded run of this file.
"""

import importlib.util
import itertools

import pytest
import torch

from megatron_kd.losses import OutputHead, linear_distillation_loss
from tests.reference.loss_cases import KERNEL_SHAPES, TARGETS, LossCase, build, on_device, whole_knowledge
from tests.reference.loss_runs import assert_agrees, reference, run_fused

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")),
]


@pytest.fixture(autouse=True)
def _whole_fp32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_matches_the_reference(shape, target, dtype, backend):
    case = LossCase(target, dtype=dtype, **KERNEL_SHAPES[shape])
    inputs = build(case)
    got = run_fused(case, on_device(inputs, "cuda"), backend=backend)
    got = {key: None if value is None else value.cpu() for key, value in got.items()}
    assert_agrees(case, got, reference(case, inputs), TOLERANCE[dtype] * (3 if case.softcap else 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("student", "teacher"), itertools.permutations((torch.float32, torch.bfloat16, torch.float64), 2)
)
def test_heads_of_different_dtypes(student, teacher, backend):
    case = LossCase("jsd", dtype=student, teacher_dtype=teacher)
    inputs = build(case)
    got = run_fused(case, on_device(inputs, "cuda"), backend=backend)
    got = {key: None if value is None else value.cpu() for key, value in got.items()}
    assert_agrees(case, got, reference(case, inputs), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", ["lm", "forward_kl", "jsd", "ghost"])
def test_bf16_gradients_go_into_an_fp32_main_grad(target, backend):
    case = LossCase(target, dtype=torch.bfloat16)
    inputs = build(case)
    moved = on_device(inputs, "cuda")
    weight = torch.nn.Parameter(moved.weight)
    weight.main_grad = torch.zeros(weight.shape, device="cuda")
    weight.grad_added_to_main_grad = False
    linear_distillation_loss(
        moved.hidden, OutputHead(weight, case.vocab), moved.labels, moved.weights, case.objective,
        whole_knowledge(case, moved), backend=backend,
    ).loss_sum.backward()  # fmt: skip
    expected = reference(case, inputs)["grad_weight"]
    assert weight.grad_added_to_main_grad
    assert_agrees(case, {"grad_weight": weight.main_grad.cpu()}, {"grad_weight": expected}, TOLERANCE[case.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_stays_within_the_byte_budget(backend):
    budget, tokens, vocabulary = 64 << 20, 2048, 65_536
    case = LossCase("jsd", tokens=tokens, hidden=64, teacher_hidden=64, rows=vocabulary, vocab=vocabulary,
                    teacher_rows=vocabulary, teacher_vocab=vocabulary, dtype=torch.bfloat16)  # fmt: skip
    inputs = on_device(build(case), "cuda")
    weight = torch.nn.Parameter(inputs.weight)
    weight.main_grad = torch.zeros(weight.shape, device="cuda")
    hidden = inputs.hidden.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_distillation_loss(
        hidden, OutputHead(weight, vocabulary), inputs.labels, inputs.weights, case.objective,
        whole_knowledge(case, inputs), tile_bytes=budget, backend=backend,
    ).loss_sum.backward()  # fmt: skip
    assert torch.cuda.max_memory_allocated() - before <= budget + hidden.nbytes + 64 * tokens * 8
