"""The Triton kernels on CPU, in Triton's interpreter, against the float64 reference; which backend is chosen.

Triton decides at its import whether it interprets, so the kernels run in a process of their own.
"""

import importlib.util
import itertools
import logging
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_kd.errors import ConfigError
from megatron_kd.losses import triton_path
from tests.distributed.ranks import Ranks
from tests.reference.loss_cases import DIVERGENCES, KERNEL_SHAPES, LossCase, build
from tests.reference.loss_runs import assert_agrees, reference, run_fused

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: its kernels cannot run, not even interpreted",
)

CASES = {
    **KERNEL_SHAPES,
    "softcap and temperature": {"softcap": 3.0, "temperature": 2.0, "teacher_rows": 64, "teacher_vocab": 61},
    "large logits": {"logit_size": 4e3},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 and a teacher in fp32": {"dtype": torch.bfloat16, "teacher_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Ranks]:
    """One process in which Triton interprets."""
    with Ranks(1) as process:
        with mock.patch.dict("os.environ", TRITON_INTERPRET="1"):
            process.run(len, "start")
        yield process


def evaluate(case: LossCase) -> tuple[dict, bool]:
    """(result, whether the kernels ran), in blocks that do not divide the vocabulary."""
    with (
        mock.patch.object(triton_path, "BLOCK", 32),
        mock.patch.object(triton_path, "_statistics", wraps=triton_path._statistics) as statistics,
    ):
        return run_fused(case, build(case), backend="triton"), statistics.called


@needs_triton
@pytest.mark.parametrize("target", ["lm", *DIVERGENCES, "0.7*forward_kl+0.3*reverse_kl"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(interpreter, target, name):
    case = LossCase(target, **{"tokens": 9, "tile_tokens": 4, **CASES[name]})
    [(got, kernels_ran)] = interpreter.run(evaluate, case)
    assert kernels_ran
    expected = reference(case, build(case))
    if name == "large logits":
        assert all(value is None or torch.isfinite(value).all() for value in got.values())
        expected = {key: expected[key] for key in ("loss_sum", "lm_sum", "kd_sum")}
    assert_agrees(case, got, expected, 3e-2 if case.dtype == torch.bfloat16 else 2e-5)


@needs_triton
@pytest.mark.parametrize(
    "case",
    [LossCase("ghost"), LossCase("0.5*jsd+0.25*reverse_kl+0.25*tvd"), LossCase("jsd", teacher_dtype=torch.float64)],
    ids=["ghost", "mixture", "fp64"],
)
def test_what_the_kernels_do_not_have_runs_in_pytorch(interpreter, case):
    [(got, kernels_ran)] = interpreter.run(evaluate, case)
    assert not kernels_ran
    torch.testing.assert_close(got["grad_weight"], run_fused(case, build(case))["grad_weight"])


def evaluate_sharded(cases: list[LossCase]) -> list[dict]:
    with mock.patch.object(triton_path, "BLOCK", 32):
        return [run_fused(case, build(case), dist.group.WORLD, backend="triton") for case in cases]


@needs_triton
def test_two_tensor_parallel_ranks_match_the_reference():
    targets = ("lm", "forward_kl", "reverse_kl", "jsd", "tvd")
    cases = [LossCase(target, tokens=6, tile_tokens=4, temperature=1.5) for target in targets]
    cases += [LossCase("jsd", tokens=6, dtype=torch.bfloat16), LossCase("skew_forward_kl", tokens=6, vocab=40)]
    with Ranks(2) as processes, mock.patch.dict("os.environ", TRITON_INTERPRET="1"):
        by_rank = processes.run(evaluate_sharded, cases)
    for index, case in enumerate(cases):
        parts = [results[index] for results in by_rank]
        got = {**parts[0], "grad_weight": torch.cat([part["grad_weight"] for part in parts])}
        assert torch.equal(parts[0]["grad_hidden"], parts[1]["grad_hidden"])
        assert_agrees(case, got, reference(case, build(case)), 3e-2 if case.dtype == torch.bfloat16 else 2e-5)


def compile_kernels() -> list[int]:
    """Bytes of machine code of every kernel for compute capability 9.0; needs no GPU."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_kd.losses import triton_kernels as kernels

    sizes = []
    variants = [
        (kernels.statistics_kernel, {"HAS_TEACHER": True, "SEPARATE_LM": True}),
        (kernels.statistics_kernel, {"HAS_TEACHER": False, "SEPARATE_LM": False}),
        (kernels.gradient_kernel, {"HAS_TEACHER": False, "KIND": 0}),
        *((kernels.divergence_kernel, {"KIND": kind}) for kind in (1, 2, 3, 4)),
        *((kernels.gradient_kernel, {"HAS_TEACHER": True, "KIND": kind}) for kind in range(5)),
    ]
    for (kernel, variant), logits in itertools.product(variants, ("*fp32", "*bf16")):
        constants = {**variant, "BLOCK": triton_path.BLOCK}
        signature = {name: _argument_type(name, constants, logits) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        sizes.append(len(triton_compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
    return sizes


def _argument_type(name: str, constants: dict, logits: str) -> str:
    if name in constants:
        return "constexpr"
    if name in ("student", "teacher"):
        return logits
    if name == "label_columns":
        return "*i64"
    if name in ("first", "second") or name.startswith("inverse"):
        return "fp32"
    return "i32" if name in ("n", "columns", "common") or name.endswith("stride") else "*fp32"


@needs_triton
def test_kernels_compile_for_hopper():
    with Ranks(1) as process:
        assert all(size > 0 for [sizes] in [process.run(compile_kernels)] for size in sizes)


def test_auto_and_torch_do_not_use_the_kernels(monkeypatch):
    monkeypatch.setattr(triton_path, "_statistics", mock.Mock(side_effect=AssertionError))
    for backend in ("auto", "torch"):
        run_fused(LossCase("jsd"), build(LossCase("jsd")), backend=backend)


def test_triton_on_a_cpu_is_refused_outside_of_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="needs a CUDA device|not installed"):
        run_fused(LossCase("lm"), build(LossCase("lm")), backend="triton")


@needs_triton
def test_auto_on_cuda_says_once_that_triton_is_there_and_stays_on_pytorch(caplog):
    triton_path._say_available.cache_clear()
    with caplog.at_level(logging.INFO, logger="megatron_kd.losses.triton_path"):
        assert not triton_path.use_triton("auto", torch.device("cuda"))
        assert not triton_path.use_triton("auto", torch.device("cuda"))
    assert len(caplog.records) == 1 and "backend=triton" in caplog.records[0].message
