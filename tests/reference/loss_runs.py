"""Runs of a loss case: the float64 reference, the package's loss on a tensor-parallel rank's share, their agreement."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.losses import OutputHead, linear_distillation_loss
from tests.reference import naive_losses
from tests.reference.loss_cases import LossCase, LossInputs, whole_knowledge


def reference(case: LossCase, inputs: LossInputs) -> dict[str, Tensor | None]:
    """Sums and gradients in float64 from whole logits."""
    leaves = [t.double().clone().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias) if t is not None]
    hidden, weight, bias = (*leaves, None)[:3]
    z_s = naive_losses.logits(hidden, weight, bias, case.scale, case.softcap)
    if case.knowledge_kind == "none":
        result = naive_losses.NaiveResult(naive_losses.lm_loss(z_s, case.vocab, inputs.labels), None, None)
    elif case.knowledge_kind == "sparse":
        s = inputs.sparse
        result = naive_losses.sparse(
            z_s, case.vocab, s.ids, s.weights, s.tail_mass, inputs.labels, case.target, case.temperature,
            case.teacher_vocab,
        )  # fmt: skip
    else:
        z_t = naive_losses.logits(
            inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, case.teacher_scale, case.teacher_softcap
        )
        result = naive_losses.dense(
            z_s, case.vocab, z_t, case.teacher_vocab, inputs.labels, case.target, case.temperature, case.beta,
            case.skew_alpha,
        )  # fmt: skip
    loss = result.loss_sum(inputs.weights, case.lm_weight, case.objective.kd_factor)
    gradients = torch.autograd.grad(loss, leaves)
    weights = inputs.weights.double()

    def total(values: Tensor | None) -> Tensor | None:
        return None if values is None else (torch.where(weights != 0, values.detach(), 0.0) * weights).sum()

    return {
        "loss_sum": loss.detach(),
        "token_count": (weights != 0).sum(),
        "lm_sum": total(result.lm),
        "kd_sum": total(result.kd),
        "teacher_entropy_sum": total(result.entropy),
        "tail_mass_sum": total(inputs.sparse.tail_mass.double() if inputs.sparse else None),
        "grad_hidden": gradients[0],
        "grad_weight": gradients[1],
        "grad_bias": gradients[2] if bias is not None else None,
    }


def run_fused(
    case: LossCase,
    inputs: LossInputs,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    gradients: bool = True,
    **options: Any,
) -> dict[str, Tensor | None]:
    """The package's loss on this rank's share: sums and this rank's gradients, keyed like :func:`reference`."""
    size = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    share = case.rows // size
    rows = slice(rank * share, (rank + 1) * share)
    hidden = inputs.hidden.tensor_split(size)[rank] if sequence_parallel else inputs.hidden
    hidden = hidden.clone().requires_grad_(gradients)
    weight = inputs.weight[rows].clone().requires_grad_(gradients)
    bias = None if inputs.bias is None else inputs.bias[rows].clone().requires_grad_(gradients)
    head = OutputHead(weight, case.vocab, rows.start, bias, case.scale, case.softcap)
    knowledge = whole_knowledge(case, inputs)
    if case.knowledge_kind == "dense" and size > 1 and not case.whole_teacher:
        knowledge = replace(knowledge, head=_rows_of(knowledge.head, rows))
    options.setdefault("tile_bytes", -(-case.tile_tokens * share * 8 * 4 // 3))  # fp32 with a dense teacher
    output = linear_distillation_loss(
        hidden, head, inputs.labels, inputs.weights, case.objective, knowledge, tp_group=group,
        sequence_parallel=sequence_parallel, **options,
    )  # fmt: skip
    if gradients:
        output.loss_sum.backward()
    return {
        "loss_sum": output.loss_sum.detach(),
        "token_count": output.token_count,
        "lm_sum": output.lm_sum,
        "kd_sum": output.kd_sum,
        "teacher_entropy_sum": output.teacher_entropy_sum,
        "tail_mass_sum": output.tail_mass_sum,
        "token_lm_losses": output.token_lm_losses,
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
        "grad_bias": None if bias is None else bias.grad,
    }


def _rows_of(head: OutputHead, rows: slice) -> OutputHead:
    return replace(
        head, weight=head.weight[rows], vocab_start=rows.start, bias=None if head.bias is None else head.bias[rows]
    )


def assert_agrees(case: LossCase, got: dict, expected: dict, tolerance: float) -> None:
    """Every entry of ``expected`` within ``tolerance``: relative for sums, of the largest entry for gradients."""
    for key, want in expected.items():
        have = got[key]
        if want is None:
            assert have is None, f"{case}: {key} should be None"
            continue
        assert have is not None, f"{case}: {key} is None"
        assert torch.isfinite(have).all(), f"{case}: {key} is not finite"
        assert have.shape == want.shape, f"{case}: {key} is {tuple(have.shape)}, not {tuple(want.shape)}"
        size = max(want.abs().max().item(), 1e-30 if want.dim() else 1e-3)
        error = (have.double() - want).abs().max().item() / size
        assert error <= tolerance, f"{case}: {key} is off by {error:.2e} relative"
