"""The fused linear-distillation loss: both output layers and their divergence, without [tokens x vocabulary] tensors.

    hidden [s, b, h] -> (all-gather under sequence parallelism) -> chunks of C tokens:
        student logits [C, R], teacher logits [C, R]  ->  statistics  ->  2 or 3 small all-reduces
        -> gradient of the logits, in place  ->  gradients of hidden [C, h] and weight [R, h]

Gradients are formed in the forward pass, so nothing is computed twice. Collectives over ``tp_group``: per chunk one
MAX all-reduce and one SUM (two for JSD, skew KLs and TVD); in the backward pass one all-reduce of the hidden states'
gradient, or under sequence parallelism one reduce-scatter beside the forward all-gather. C is the byte budget divided
by the bytes of a token's logits on this rank, so memory is flat in tokens and vocabulary.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_kd.errors import ConfigError
from megatron_kd.losses import triton_path
from megatron_kd.losses.buffers import Workspace
from megatron_kd.losses.chunk_terms import Problem
from megatron_kd.losses.chunk_walk import ChunkWalk
from megatron_kd.losses.collectives import TensorParallel
from megatron_kd.losses.types import (
    LM_ONLY,
    DenseKnowledge,
    DistillationObjective,
    LossOutput,
    OutputHead,
    SparseKnowledge,
)

DEFAULT_CHUNK_BYTES = {"cuda": 896 << 20, "cpu": 1280 << 20}  # few chunks: each reads all weights and main_grad
BACKENDS = ("auto", "torch", "triton")


def linear_distillation_loss(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    token_weights: Tensor,
    objective: DistillationObjective = LM_ONLY,
    knowledge: DenseKnowledge | SparseKnowledge | None = None,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    gradient_scale: float = 1.0,
    workspace: Workspace | None = None,
) -> LossOutput:
    """The weighted LM and distillation loss of a micro-batch, with gradients if gradients are on.

    Args:
        hidden: the student's final hidden states, [s, b, h] ([s / TP, b, h] under sequence parallelism) or [n, h].
        head: the student's; ``head.weight`` is the parameter that receives the gradient.
        labels: [n] int64 global ids in the order of ``hidden`` (s-major), all of them on every rank.
        token_weights: [n]; 0 leaves a token out.
        objective: weights of the terms, divergence, temperature.
        knowledge: what the teacher says; None for the LM loss alone.
        tp_group: the tensor-parallel group over which the head's rows are sharded; None for one rank.
        sequence_parallel: ``hidden`` is this rank's part of the sequence.
        chunk_bytes: memory of the logit chunks of both models and their temporaries
            (:mod:`~megatron_kd.losses.chunk_plan` says what is counted); None for ``DEFAULT_CHUNK_BYTES``.
        backend: ``torch``, ``triton`` or ``auto``.
        gradient_scale: the gradient that will arrive at ``loss_sum``. It must be right if the weight has
            ``main_grad``, which is added to before backward; backward checks it.
        workspace: keeps the chunk buffers for the next call on the CPU; None frees them.

    Returns:
        Sums over the n tokens, the same on every rank of ``tp_group``.

    Raises:
        ConfigError: shapes, dtypes or settings that do not fit together.
        LayoutError: the head's rows are not those of this rank, or the teacher's do not cover them.
    """
    _check_objective(objective, knowledge, backend)
    with_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, head.weight, head.bias)
    )
    walk = ChunkWalk(
        head, labels.reshape(-1), token_weights.reshape(-1), knowledge,
        _problem(head, knowledge, objective, gradient_scale), TensorParallel(tp_group), sequence_parallel,
        chunk_bytes or DEFAULT_CHUNK_BYTES["cuda" if head.weight.is_cuda else "cpu"], with_gradient,
        triton_path.use_triton(backend, head.weight.device), workspace,
    )  # fmt: skip
    if with_gradient:
        loss_sum = _FormGradients.apply(hidden, head.weight, head.bias, walk)
    else:
        with torch.no_grad():
            loss_sum = walk.forward(hidden)
    return replace(walk.output, loss_sum=loss_sum)


class _FormGradients(torch.autograd.Function):
    """Connects a walk, which has its gradients already, to autograd."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, walk: ChunkWalk) -> Tensor:
        ctx.walk = walk
        ctx.save_for_backward(hidden)
        return walk.forward(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (hidden,) = ctx.saved_tensors
        if ctx.walk.delivered:  # gradients are handed over, not copied; a retained graph forms them again
            ctx.walk.forward(hidden)
        return *ctx.walk.backward(upstream), None


def _problem(
    head: OutputHead,
    knowledge: DenseKnowledge | SparseKnowledge | None,
    objective: DistillationObjective,
    gradient_scale: float,
) -> Problem:
    common = head.valid_vocab_size
    if knowledge is None:
        objective = replace(objective, temperature=1.0)
    if isinstance(knowledge, DenseKnowledge):
        common = min(common, knowledge.head.valid_vocab_size)
    if isinstance(knowledge, SparseKnowledge) and knowledge.vocab_size is not None:
        common = min(common, knowledge.vocab_size)
    return Problem(
        objective, head.vocab_start, head.valid_vocab_size, common, head.rows_below(common),
        head.scale, head.final_softcap, gradient_scale,
    )  # fmt: skip


def _check_objective(
    objective: DistillationObjective, knowledge: DenseKnowledge | SparseKnowledge | None, backend: str
) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"losses backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if knowledge is None and objective.kd_weight != 0:
        raise ConfigError(f"kd_weight is {objective.kd_weight}, but no teacher knowledge was given")
