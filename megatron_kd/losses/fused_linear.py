"""The fused linear-distillation loss: both output layers and their divergence, without [tokens x vocabulary] tensors.

    hidden [s, b, h] -> (all-gather under sequence parallelism) -> tiles of C tokens:
        student logits [C, R], teacher logits [C, R]  ->  statistics  ->  2 or 3 small all-reduces
        -> gradient of the logits, in place  ->  gradients of hidden [C, h] and weight [R, h]

An evaluator (``torch_path`` or ``triton_path``) turns a tile's logits into token losses and their gradient. Gradients
are formed in the forward pass, so nothing is computed twice; the backward pass delivers them. Collectives over
``tp_group``: per tile one MAX all-reduce and one SUM (two for JSD, skew KLs and TVD); in the backward pass one
all-reduce of the hidden states' gradient, or under sequence parallelism one reduce-scatter beside the forward
all-gather. C is the byte budget divided by the bytes of a token's logits on this rank, so memory is flat in tokens and
vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.losses import torch_path, triton_path
from megatron_kd.losses.tile_buffers import (
    HeadLogits,
    TileDtypes,
    TileLogits,
    TilePlan,
    Workspace,
    bytes_per_logit,
    work_dtype,
)
from megatron_kd.losses.tile_terms import Evaluate, Problem, TensorParallel, Tile, TokenLosses, row_blocks
from megatron_kd.losses.types import (
    LM_ONLY,
    DenseKnowledge,
    DistillationObjective,
    LossOutput,
    OutputHead,
    SparseKnowledge,
)
from megatron_kd.losses.weight_gradient import WeightGradient, main_grad

DEFAULT_TILE_BYTES = {"cuda": 896 << 20, "cpu": 1280 << 20}  # few tiles: each reads all weights and main_grad
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
    tile_bytes: int | None = None,
    backend: str = "auto",
    gradient_scale: float = 1.0,
    workspace: Workspace | None = None,
) -> LossOutput:
    """Compute the weighted LM and distillation loss of a micro-batch, with gradients if gradients are on.

    Args:
        hidden: the student's final hidden states, [s, b, h] ([s / TP, b, h] under sequence parallelism) or [n, h].
        head: the student's; ``head.weight`` is the parameter that receives the gradient.
        labels: [n] int64 global ids in the order of ``hidden`` (s-major), all of them on every rank.
        token_weights: [n]; 0 leaves a token out.
        objective: weights of the terms, divergence, temperature.
        knowledge: the teacher's distribution, whole or sparse; None for the LM loss alone.
        tp_group: the tensor-parallel group over which the head's rows are sharded; None for one rank.
        sequence_parallel: ``hidden`` is this rank's part of the sequence.
        tile_bytes: memory of a tile's logits of both models and their temporaries
            (:mod:`~megatron_kd.losses.tile_buffers` lists what is counted); None for ``DEFAULT_TILE_BYTES``.
        backend: ``torch``, ``triton`` or ``auto``.
        gradient_scale: the gradient that will arrive at ``loss_sum``. It must be right if the weight has
            ``main_grad``, which is added to before backward; backward checks it.
        workspace: keeps the tile's buffers for the next call on the CPU; None frees them.

    Returns:
        Sums over the n tokens, the same on every rank of ``tp_group``.

    Raises:
        ConfigError: shapes, dtypes or settings that do not fit together.
        LayoutError: the head's rows are not those of this rank, or the teacher's do not cover them.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"losses backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if knowledge is None and objective.kd_weight != 0:
        raise ConfigError(f"kd_weight is {objective.kd_weight}, but no teacher knowledge was given")
    dense = knowledge if isinstance(knowledge, DenseKnowledge) else None
    sparse = knowledge if isinstance(knowledge, SparseKnowledge) else None
    with_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, head.weight, head.bias)
    )
    call = _LossCall(
        head=head,
        labels=labels.reshape(-1),
        weights=token_weights.reshape(-1),
        dense=dense,
        sparse=sparse,
        problem=Problem.of(head, dense, sparse, objective, gradient_scale),
        tensor_parallel=TensorParallel(tp_group),
        sequence_parallel=sequence_parallel,
        tile_bytes=tile_bytes or DEFAULT_TILE_BYTES["cuda" if head.weight.is_cuda else "cpu"],
        with_gradient=with_gradient,
        triton=triton_path.use_triton(backend, head.weight.device),
        workspace=workspace,
    )
    if with_gradient:
        loss_sum, sums = _FormGradients.apply(hidden, head.weight, head.bias, call)
    else:
        with torch.no_grad():
            loss_sum, sums, _ = call.run(hidden)
    return replace(sums, loss_sum=loss_sum)


class _FormGradients(torch.autograd.Function):
    """Connects a call, which forms its gradients in the forward pass, to autograd."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: "_LossCall"
    ) -> tuple[Tensor, LossOutput]:
        loss_sum, sums, ctx.gradients = call.run(hidden)
        ctx.call = call
        ctx.save_for_backward(hidden)
        return loss_sum, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (hidden,) = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # handed over, not copied
        if gradients is None:  # a retained graph forms them again
            if ctx.call.adds_to_main_grad:
                raise RuntimeError("backward cannot run twice on a loss whose gradient has gone into main_grad")
            _, _, gradients = ctx.call.run(hidden)
        return *ctx.call.deliver(gradients, upstream, hidden.shape), None


@dataclass
class _Gradients:
    """Gradients that the tiles form: of the hidden states [n, h], the weight and the bias, None where not wanted."""

    hidden: Tensor | None
    weight: WeightGradient | None
    bias: Tensor | None

    def add(self, logit_gradient: Tensor, rows: slice, student: TileLogits) -> None:
        """Add a tile, the tokens ``rows``; ``logit_gradient`` [n, R] is with respect to the matrix product's result."""
        if self.bias is not None:
            self.bias[: logit_gradient.shape[1]] += logit_gradient.sum(0, dtype=self.bias.dtype)
        logit_gradient = logit_gradient.to(student.hidden.dtype)
        if self.hidden is not None:
            torch.mm(logit_gradient, student.head.weight, out=self.hidden[rows])
        if self.weight is not None:
            self.weight.add(logit_gradient, student.hidden[rows])


@dataclass
class _LossCall:
    """The arguments of one call.

    ``labels`` and ``weights`` are [n], of all tokens; with ``triton`` the kernels serve what they can express. Nothing
    that a run forms is kept here: autograd holds the call, so a tensor with a graph would be freed by gc alone.
    """

    head: OutputHead
    labels: Tensor
    weights: Tensor
    dense: DenseKnowledge | None
    sparse: SparseKnowledge | None
    problem: Problem
    tensor_parallel: TensorParallel
    sequence_parallel: bool
    tile_bytes: int
    with_gradient: bool
    triton: bool
    workspace: Workspace | None

    @property
    def adds_to_main_grad(self) -> bool:
        """Whether the weight's gradient goes into ``main_grad`` while it is formed."""
        return self.head.weight.requires_grad and main_grad(self.head.weight) is not None

    def run(self, hidden: Tensor) -> tuple[Tensor, LossOutput, _Gradients | None]:
        """Evaluate all tiles: the loss sum, all sums (detached), and the gradients that ``deliver`` hands over."""
        full = self.tensor_parallel.gather_sequence(hidden) if self.sequence_parallel else hidden
        tokens = full.reshape(-1, full.shape[-1]).to(self.head.weight.dtype)
        self._check(tokens, hidden.shape)
        tiles = self._tiles(tokens, hidden.requires_grad)
        losses = TokenLosses.concatenate([tiles.evaluate(rows) for rows in tiles.plan.tiles(tokens.shape[0])])
        return *self._sums(losses), tiles.gradients

    def deliver(
        self, gradients: _Gradients, upstream: Tensor, shape: torch.Size
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden states of ``shape``, weight and bias, times ``upstream``."""
        scale = self.problem.gradient_scale
        in_main_grad = gradients.weight is not None and gradients.weight.into_main_grad
        if in_main_grad and upstream.float().item() != torch.tensor(scale, dtype=torch.float32).item():
            raise RuntimeError(
                f"the gradient that arrived at the loss is {upstream.item()}, but gradient_scale={scale} was declared "
                f"and has gone into main_grad already: pass gradient_scale={upstream.item()}"
            )
        factor = upstream / scale
        grad_hidden = grad_weight = grad_bias = None
        if gradients.hidden is not None:
            grad_hidden = gradients.hidden.mul_(factor)
            if self.sequence_parallel:
                grad_hidden = self.tensor_parallel.scatter_sequence(grad_hidden.reshape(-1, *shape[1:]))
            else:
                self.tensor_parallel.sum_(grad_hidden)
            grad_hidden = grad_hidden.reshape(shape)
        if gradients.weight is not None:
            grad_weight = gradients.weight.deliver(factor)
        if gradients.bias is not None and self.head.bias is not None:
            grad_bias = (gradients.bias * factor).to(self.head.bias.dtype)
        return grad_hidden, grad_weight, grad_bias

    def _check(self, tokens: Tensor, shape: torch.Size) -> None:
        head, n, size = self.head, tokens.shape[0], self.tensor_parallel.size
        if n == 0:
            raise ConfigError(f"the loss was given no tokens: hidden states of shape {tuple(shape)}")
        if tokens.shape[1] != head.weight.shape[1]:
            raise ConfigError(
                f"hidden states of size {tokens.shape[1]} do not fit a head of size {head.weight.shape[1]}"
            )
        for name, given in (("labels", self.labels), ("token_weights", self.weights)):
            if given.shape[0] != n:
                raise ConfigError(f"{name} has {given.shape[0]} tokens, the hidden states have {n}")
        if self.sparse is not None and self.sparse.ids.shape[0] != n:
            raise ConfigError(f"the sparse knowledge has {self.sparse.ids.shape[0]} tokens, not {n}")
        rows, first = head.weight.shape[0], self.tensor_parallel.rank * head.weight.shape[0]
        if head.vocab_start != first or head.valid_vocab_size > size * rows:
            raise LayoutError(
                f"{rows} rows of an output weight on each of {size} tensor-parallel ranks cannot be those from id "
                f"{head.vocab_start} on (here they begin at {first}) of a vocabulary of {head.valid_vocab_size}"
            )

    def _tiles(self, tokens: Tensor, hidden_needs_gradient: bool) -> "_Tiles":
        weight = self.head.weight
        states = [tokens]
        heads = [HeadLogits(self.head, 0, self.head.rows_below(self.problem.student_vocab_size))]
        if self.dense is not None:
            states.append(self._teacher_tokens(self.dense))
            heads.append(self._teacher_head(self.dense.head))
        weights = [head.weight.dtype for head in heads]
        evaluator = self._evaluator(weights)
        by_kernels = evaluator is triton_path.evaluate
        dtypes = TileDtypes.of(
            weights,
            kernels_read_narrow=by_kernels and all(triton_path.reads_narrow(head) for head in heads),
            widens_by_block=self.tensor_parallel.size == 1 and weight.device.type == "cpu",
        )
        logit_bytes = bytes_per_logit(weights, dtypes.stored)
        plan = TilePlan.of(self.tile_bytes, tokens.shape[0], weight.shape[0], dtypes.evaluated.itemsize, logit_bytes)
        workspace, models = self.workspace or Workspace(), []
        for name, hidden, head in zip(("student", "teacher"), states, heads):
            shape = (plan.tokens, head.weight.shape[0])
            buffer = workspace.take(name, shape, dtypes.stored, weight.device)
            models.append(TileLogits(hidden, head, buffer))
        gradients = self._new_gradients(models[0], plan, hidden_needs_gradient) if self.with_gradient else None
        teacher = models[1] if self.dense is not None else None
        return _Tiles(self, models[0], teacher, dtypes, plan, evaluator, gradients)

    def _teacher_tokens(self, dense: DenseKnowledge) -> Tensor:
        head, hidden = dense.head, dense.hidden
        tokens = hidden.detach().reshape(-1, hidden.shape[-1]).to(head.weight.dtype)
        if tokens.shape != (self.labels.shape[0], head.weight.shape[1]):
            raise ConfigError(
                f"teacher hidden states [{', '.join(map(str, tokens.shape))}] do not fit "
                f"{self.labels.shape[0]} tokens and a head of size {head.weight.shape[1]}"
            )
        return tokens

    def _teacher_head(self, head: OutputHead) -> HeadLogits:
        first, rows = self.problem.vocab_start - head.vocab_start, self.problem.common_columns
        if rows and (first < 0 or first + rows > head.weight.shape[0]):
            raise LayoutError(
                f"the teacher's output weight has the ids {head.vocab_start} to "
                f"{head.vocab_start + head.weight.shape[0] - 1} on this rank, the student's needs "
                f"{self.problem.vocab_start} to {self.problem.vocab_start + rows - 1}: "
                f"shard it by the student's intervals"
            )
        return HeadLogits(head, max(first, 0), rows)

    def _evaluator(self, weights: list[torch.dtype]) -> Evaluate:
        divergence = None if self.dense is None else self.problem.objective.divergence
        has_kernels = self.sparse is None and (divergence is None or triton_path.has_kernel(divergence))
        use_triton = self.triton and has_kernels and torch.float64 not in weights
        return triton_path.evaluate if use_triton else torch_path.evaluate

    def _new_gradients(self, student: TileLogits, plan: TilePlan, hidden_needs_gradient: bool) -> _Gradients:
        weight, bias = self.head.weight, self.head.bias
        hidden = torch.empty_like(student.hidden) if hidden_needs_gradient else None
        rows = student.head.weight.shape[0]
        weight_gradient = WeightGradient(weight, rows, plan.temporary_bytes) if weight.requires_grad else None
        bias_gradient = None
        if bias is not None and bias.requires_grad:
            bias_gradient = torch.zeros(bias.shape, dtype=work_dtype(bias.dtype), device=bias.device)
        return _Gradients(hidden, weight_gradient, bias_gradient)

    def _sums(self, losses: TokenLosses) -> tuple[Tensor, LossOutput]:
        objective = self.problem.objective
        counted = self.weights != 0
        weights = self.weights.to(losses.lm.dtype)

        def total(values: Tensor) -> Tensor:
            return (torch.where(counted, values, 0.0) * weights).sum()

        lm_sum = total(losses.lm)
        kd_sum = None if losses.kd is None else total(losses.kd)
        # a term without weight is left out: it may be infinite (a label that the student does not have)
        loss_sum = lm_sum * objective.lm_weight if objective.lm_weight else torch.zeros_like(lm_sum)
        if kd_sum is not None and objective.kd_weight:
            loss_sum = loss_sum + kd_sum * objective.kd_factor
        return loss_sum, LossOutput(
            loss_sum=loss_sum.detach(),
            token_count=counted.sum(),
            lm_sum=lm_sum,
            kd_sum=kd_sum,
            teacher_entropy_sum=None if losses.entropy is None else total(losses.entropy),
            tail_mass_sum=None if self.sparse is None else total(self.sparse.tail_mass),
            token_lm_losses=None if self.with_gradient else torch.where(counted, losses.lm, 0.0),
        )


@dataclass
class _Tiles:
    """The tiles of one run: both models with their buffers, and the gradients to which each tile adds."""

    call: _LossCall
    student: TileLogits
    teacher: TileLogits | None
    dtypes: TileDtypes
    plan: TilePlan
    evaluator: Evaluate
    gradients: _Gradients | None

    def evaluate(self, rows: slice) -> TokenLosses:
        """Evaluate the tile of the tokens ``rows`` and add its gradients."""
        student = self.student.multiply(rows)
        if self.teacher is not None:
            self.teacher.multiply(rows)
        n, columns = student.shape
        blocks = [slice(0, n)]
        if self.dtypes.by_block:
            blocks = list(row_blocks(n, columns, self.plan.block_elements))
        losses = [self._evaluate_block(rows.start, block) for block in blocks]
        if self.gradients is not None:
            self.gradients.add(student, rows, self.student)
        return TokenLosses.concatenate(losses)

    def _evaluate_block(self, offset: int, block: slice) -> TokenLosses:
        """Evaluate the rows ``block`` of a tile that begins at the token ``offset``; logits become their gradient."""
        call, dtype = self.call, self.dtypes.evaluated
        rows = slice(offset + block.start, offset + block.stop)
        tile = Tile(
            student=self.student.finish(block, dtype),
            labels=call.labels[rows],
            weights=call.weights[rows].to(work_dtype(dtype)),
            teacher=None if self.teacher is None else self.teacher.finish(block, dtype),
            sparse=None if call.sparse is None else call.sparse.of_tokens(rows),
        )
        with_gradient = self.gradients is not None
        losses = self.evaluator(tile, call.problem, call.tensor_parallel, with_gradient, self.plan.block_elements)
        if with_gradient and self.dtypes.by_block:
            self.student.buffer[block].copy_(tile.student)
        return losses
