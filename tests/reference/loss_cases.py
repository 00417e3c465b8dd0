"""Random inputs for the losses, made from the seed alone: every process of a distributed test builds the same tensors.

``loss_runs.py`` runs them."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_kd.losses import (
    SPARSE_TARGET_KINDS,
    DenseKnowledge,
    DistillationObjective,
    OutputHead,
    SparseKnowledge,
    divergence_from_config,
)
from tests.reference import naive_losses

DIVERGENCES = tuple(naive_losses.DIVERGENCES)
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
"""Shapes that the kernels are tested with, interpreted and on a GPU."""
MODES = {"some": 0.7, "all": 1.0, "none": 0.0}


@dataclass(frozen=True)
class LossCase:
    """``target`` is ``lm``, a divergence, a mixture or a sparse target. ``rows`` are padded vocabulary sizes.

    ``whole_teacher``: every tensor-parallel rank has all rows of the teacher's weight, from id 0 on. ``teacher_dtype``:
    of the teacher's tensors, None for ``dtype``.
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
    teacher_dtype: torch.dtype | None = None
    tile_tokens: int = 7
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

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype)

    of_teacher = case.teacher_dtype or case.dtype

    n = case.tokens
    keep = torch.rand(n, generator=generator) < MODES[case.unmasked]
    labels = torch.randint(0, min(case.vocab, case.teacher_vocab), (n,), generator=generator)
    inputs = LossInputs(
        hidden=normal(n, case.hidden, size=case.logit_size),
        weight=normal(case.rows, case.hidden, size=0.5),
        bias=normal(case.rows) if case.bias else None,
        teacher_hidden=normal(n, case.teacher_hidden, size=case.logit_size, dtype=of_teacher),
        teacher_weight=normal(case.teacher_rows, case.teacher_hidden, size=0.4, dtype=of_teacher),
        labels=torch.where(keep, labels, IGNORED_LABEL),
        weights=torch.where(keep, 0.5 + torch.rand(n, generator=generator), 0.0),
        sparse=None,
    )
    if case.teacher_bias:
        inputs.teacher_bias = normal(case.teacher_rows, dtype=of_teacher)
    if case.knowledge_kind == "sparse":
        inputs.sparse = _sparse(case, inputs, generator)
    return inputs


def whole_knowledge(case: LossCase, inputs: LossInputs) -> DenseKnowledge | SparseKnowledge | None:
    """The teacher's knowledge, unsharded."""
    if case.knowledge_kind != "dense":
        return inputs.sparse
    head = OutputHead(
        inputs.teacher_weight, case.teacher_vocab, 0, inputs.teacher_bias, case.teacher_scale, case.teacher_softcap
    )
    return DenseKnowledge(inputs.teacher_hidden, head)


def on_device(inputs: LossInputs, device: str) -> LossInputs:
    """Copy the inputs to a device."""
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
    weights = torch.where(absent, 0.125, weights)  # the weight of an absent entry must not matter
    return SparseKnowledge(ids, weights.float(), tail.float(), case.target, case.teacher_vocab)
