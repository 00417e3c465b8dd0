"""The fused loss on 1, 2 and 4 tensor-parallel ranks against the one-rank float64 reference, with collectives counted.

Every size runs the same cases, so agreement with the reference makes gradients independent of TP.
"""

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import shared_ranks
from tests.reference.loss_cases import TARGETS, LossCase, build
from tests.reference.loss_runs import assert_agrees, reference, run_fused

TOLERANCE = 2e-5
SIZES = (1, 2, 4)
CASES = [LossCase(target, tokens=24, seed=i) for i, target in enumerate(TARGETS)]
CASES += [LossCase(target, tokens=24, temperature=2.0, temperature_squared=True) for target in TARGETS]
CASES += [
    LossCase("forward_kl", tokens=24, vocab=20, teacher_vocab=20),  # at TP 4 a rank holds padding alone
    LossCase("forward_kl", tokens=24, vocab=83, teacher_vocab=70),  # ids that only the student has
    LossCase("jsd", tokens=24, vocab=83, teacher_vocab=20),
    LossCase("reverse_kl", tokens=24, vocab=70, teacher_vocab=83),  # ids that only the teacher has
    LossCase("forward_kl", tokens=24, softcap=5.0, teacher_softcap=4.0, bias=True, scale=0.7),
    LossCase("ghost", tokens=24, vocab=20, teacher_vocab=20),
    LossCase("ghost", tokens=24, vocab=83, teacher_vocab=70),
    LossCase("sampled", tokens=24, vocab=70, teacher_vocab=83),
    LossCase("forward_kl", tokens=24, whole_teacher=True, teacher_rows=128, teacher_bias=True, teacher_scale=0.7),
    LossCase("jsd", tokens=24, whole_teacher=True, teacher_rows=128, teacher_vocab=90, softcap=5.0, temperature=2.0),
    LossCase("skew_reverse_kl", tokens=24, unmasked="none"),
    LossCase("forward_kl", tokens=24, unmasked="none"),
    LossCase("forward_kl", tokens=24, logit_size=2e3),
]
CASES += [LossCase(target, tokens=24, dtype=torch.bfloat16) for target in ("lm", "forward_kl", "jsd", "ghost")]


def evaluate(cases: list[LossCase], sequence_parallel: bool) -> list[dict]:
    return [run_fused(case, build(case), dist.group.WORLD, sequence_parallel) for case in cases]


def count_collectives(case: LossCase, sequence_parallel: bool, gradients: bool = True) -> tuple[Counter, Counter]:
    """(calls in forward, calls in backward) on this rank, by name."""
    calls, at_backward = Counter(), []
    watched = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast")

    def counting(name):
        original = getattr(dist, name)

        def call(*arguments, **keywords):
            operation = keywords.get("op", "")
            calls[f"{name} {operation}".strip().replace("RedOpType.", "")] += 1
            return original(*arguments, **keywords)

        return mock.patch.object(dist, name, call)

    original_backward = torch.Tensor.backward

    def backward(tensor, *arguments, **keywords):
        at_backward.append(Counter(calls))
        return original_backward(tensor, *arguments, **keywords)

    patches = [counting(name) for name in watched] + [mock.patch.object(torch.Tensor, "backward", backward)]
    for patch in patches:
        patch.start()
    try:
        run_fused(case, build(case), dist.group.WORLD, sequence_parallel, gradients)
    finally:
        for patch in patches:
            patch.stop()
    forward = at_backward[0] if at_backward else Counter(calls)
    return forward, calls - forward


def joined(parts: list[dict], sequence_parallel: bool) -> dict:
    """Join the ranks' results, after checking that the sums are equal on all of them."""
    whole = dict(parts[0])
    for key in ("loss_sum", "lm_sum", "kd_sum", "token_count", "teacher_entropy_sum", "tail_mass_sum"):
        assert all(part[key] is None or torch.equal(part[key], parts[0][key]) for part in parts), key
    if sequence_parallel:
        whole["grad_hidden"] = torch.cat([part["grad_hidden"] for part in parts])
    else:
        assert all(torch.equal(part["grad_hidden"], parts[0]["grad_hidden"]) for part in parts)
    for key in ("grad_weight", "grad_bias"):
        if parts[0][key] is not None:
            whole[key] = torch.cat([part[key] for part in parts])
    return whole


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"])
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_every_gradient_match_the_reference(size, sequence_parallel):
    by_rank = shared_ranks(size).run(evaluate, CASES, sequence_parallel)
    for index, case in enumerate(CASES):
        got = joined([results[index] for results in by_rank], sequence_parallel)
        expected = reference(case, build(case))
        tolerance = 3e-2 if case.dtype == torch.bfloat16 else TOLERANCE if case.logit_size == 1.0 else 2e-4
        assert_agrees(case, got, expected, tolerance)


@pytest.mark.parametrize(
    ("target", "sums"),
    [("lm", 1), ("forward_kl", 1), ("reverse_kl", 1), ("0.7*forward_kl+0.3*reverse_kl", 1), ("ghost", 1),
     ("renormalised", 1), ("sampled", 1), ("weighted", 1), ("jsd", 2), ("skew_forward_kl", 2),
     ("skew_reverse_kl", 2), ("tvd", 2), ("0.5*jsd+0.25*reverse_kl+0.25*tvd", 2)],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_collectives_per_tile_and_per_micro_batch(target, sums, temperature):
    case = LossCase(target, tokens=24, tile_tokens=8, temperature=temperature)
    tiles = 3
    if target in ("lm", "ghost", "renormalised", "sampled", "weighted"):
        tiles = 2  # no teacher logits: tiles hold twice the tokens
    forward = Counter({"all_reduce MAX": tiles, "all_reduce SUM": sums * tiles})
    for got_forward, got_backward in shared_ranks(2).run(count_collectives, case, False):
        assert got_forward == forward
        assert got_backward == Counter({"all_reduce SUM": 1})
    for got_forward, got_backward in shared_ranks(2).run(count_collectives, case, True):
        assert got_forward == forward + Counter({"all_gather_into_tensor": 1})
        assert got_backward == Counter({"reduce_scatter_tensor SUM": 1})
    for got_forward, got_backward in shared_ranks(2).run(count_collectives, case, False, gradients=False):
        assert got_forward == forward and not got_backward
