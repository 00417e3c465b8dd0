"""Random inputs for the losses, their float64 reference, and one tensor-parallel rank's share of them.

A case is made from its seed alone, so every process of a distributed test builds the same tensors.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.losses import (
    SPARSE_TARGET_KINDS,
    DenseKnowledge,
    DistillationObjective,
    OutputHead,
    SparseKnowledge,
    divergence_from_config,
    linear_distillation_loss,
)
from tests.reference import naive_losses

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
MIXTURES = ("0.7*forward_kl+0.3*reverse_kl", "0.5*jsd+0.25*reverse_kl+0.25*tvd")
TARGETS = ("lm", *DIVERGENCES, *MIXTURES, *SPARSE_TARGET_KINDS)
IGNORED_LABEL = -100
KERNEL_SHAPES = {
    "plain": {},
    "one token": {"tokens": 1, "unmasked": "all"},
    "masked": {"unmasked": "none"},
    "temperature": {"temperature": 2.0, "temperature_squared": True},
    "softcap, scale and bias": {"softcap": 3.0, "teacher_softcap": 4.0, "scale": 0.8, "bias": True},
    "ids that only the student has": {"teacher_rows": 64, "teacher_vocab": 61},
    "ids that only the teacher has": {"rows": 64, "vocab": 61},
}
"""What the kernels' tests go through, interpreted and on a GPU."""
MODES = {"some": 0.7, "all": 1.0, "none": 0.0}


@dataclass(frozen=True)
class LossCase:
    """``target`` is ``lm``, a divergence, a mixture or a sparse target. ``rows`` are padded vocabulary sizes.

    ``whole_teacher``: every tensor-parallel rank has all rows of the teacher's weight, from id 0 on.
    """

    target: str = "forward_kl"
    tokens: int = 23
    hidden: int = 16
    teacher_hidden: int = 24
    rows: int = 96
    teacher_rows: int = 96
    vocab: int = 83
    teacher_vocab: int = 83
    temperature: float = 1.0
    temperature_squared: bool = False
    softcap: float | None = None
    teacher_softcap: float | None = None
    scale: float = 1.0
    bias: bool = False
    teacher_scale: float = 1.0
    teacher_bias: bool = False
    whole_teacher: bool = False
    unmasked: str = "some"
    lm_weight: float = 0.4
    kd_weight: float = 0.6
    beta: float = 0.3
    skew_alpha: float = 0.1
    logit_size: float = 1.0
    entries: int = 6
    dtype: torch.dtype = torch.float32
    chunk_tokens: int = 7
    seed: int = 0

    @property
    def knowledge_kind(self) -> str:
        return "none" if self.target == "lm" else "sparse" if self.target in SPARSE_TARGET_KINDS else "dense"

    @property
    def objective(self) -> DistillationObjective:
        if self.knowledge_kind == "none":
            return DistillationObjective(self.lm_weight)
        base = DistillationObjective(
            self.lm_weight, self.kd_weight, temperature=self.temperature, temperature_squared=self.temperature_squared
        )
        if self.knowledge_kind == "sparse":
            return base
        return replace(base, divergence=divergence_from_config(self.target, self.beta, self.skew_alpha))


@dataclass
class LossInputs:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    weights: Tensor
    sparse: SparseKnowledge | None
    teacher_bias: Tensor | None = None


def build(case: LossCase) -> LossInputs:
    """The whole inputs, unsharded."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(case.dtype)

    n = case.tokens
    keep = torch.rand(n, generator=generator) < MODES[case.unmasked]
    labels = torch.randint(0, min(case.vocab, case.teacher_vocab), (n,), generator=generator)
    inputs = LossInputs(
        hidden=normal(n, case.hidden, size=case.logit_size),
        weight=normal(case.rows, case.hidden, size=0.5),
        bias=normal(case.rows) if case.bias else None,
        teacher_hidden=normal(n, case.teacher_hidden, size=case.logit_size),
        teacher_weight=normal(case.teacher_rows, case.teacher_hidden, size=0.4),
        labels=torch.where(keep, labels, IGNORED_LABEL),
        weights=torch.where(keep, 0.5 + torch.rand(n, generator=generator), 0.0),
        sparse=None,
    )
    if case.teacher_bias:
        inputs.teacher_bias = normal(case.teacher_rows)
    if case.knowledge_kind == "sparse":
        inputs.sparse = _sparse(case, inputs, generator)
    return inputs


def on_device(inputs: LossInputs, device: str) -> LossInputs:
    """The same inputs elsewhere."""
    moved = {f.name: getattr(inputs, f.name) for f in fields(LossInputs)}
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in moved.items()}
    if inputs.sparse is not None:
        s = inputs.sparse
        moved["sparse"] = replace(
            s, ids=s.ids.to(device), weights=s.weights.to(device), tail_mass=s.tail_mass.to(device)
        )
    return LossInputs(**moved)


def _sparse(case: LossCase, inputs: LossInputs, generator: torch.Generator) -> SparseKnowledge:
    z = naive_losses.logits(inputs.teacher_hidden, inputs.teacher_weight, None, 1.0, case.teacher_softcap)
    p = naive_losses.masked_log_softmax(z, case.teacher_vocab).exp()
    weights, ids = p.topk(case.entries)
    if case.target == "sampled":
        draws = torch.multinomial(p, 16, replacement=True, generator=generator)
        counts = torch.zeros_like(p).scatter_add_(1, draws, torch.ones_like(draws, dtype=p.dtype)) / 16
        weights, ids = counts.topk(case.entries * 2)
    if case.target == "weighted":
        weights = weights * (0.5 + torch.rand(weights.shape, generator=generator))
    absent = torch.rand(ids.shape, generator=generator) < 0.2
    absent[:, 0] = False
    if case.target == "sampled":
        absent = weights == 0
    ids = torch.where(absent, -1, ids)
    tail = (1 - torch.where(absent, 0.0, weights).sum(-1)).clamp_min(0.0)
    weights = torch.where(absent, 0.125, weights)  # what an absent entry holds must not matter
    return SparseKnowledge(ids, weights.float(), tail.float(), case.target, case.teacher_vocab)


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
    knowledge: DenseKnowledge | SparseKnowledge | None = inputs.sparse
    if case.knowledge_kind == "dense":
        whole = size == 1 or case.whole_teacher
        teacher_rows = slice(0, case.teacher_rows) if whole else rows
        teacher = OutputHead(
            inputs.teacher_weight[teacher_rows], case.teacher_vocab, teacher_rows.start,
            None if inputs.teacher_bias is None else inputs.teacher_bias[teacher_rows], case.teacher_scale,
            case.teacher_softcap,
        )  # fmt: skip
        knowledge = DenseKnowledge(inputs.teacher_hidden, teacher)
    options.setdefault("chunk_bytes", -(-case.chunk_tokens * share * 8 * 4 // 3))  # fp32 with a dense teacher
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
