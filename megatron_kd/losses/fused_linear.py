"""The fused linear-distillation loss: both output layers and their divergence, without [tokens x vocabulary] tensors.

    hidden [s, b, h] -> (all-gather under sequence parallelism) -> tiles of C tokens:
        student logits [C, R], teacher logits [C, R]  ->  statistics  ->  2 or 3 small all-reduces
        -> gradient of the logits, in place  ->  gradients of hidden [C, h] and weight [R, h]

Gradients are formed in the forward pass, so nothing is computed twice. Collectives over ``tp_group``: per tile one
MAX all-reduce and one SUM (two for JSD, skew KLs and TVD); in the backward pass one all-reduce of the hidden states'
gradient, or under sequence parallelism one reduce-scatter beside the forward all-gather. C is the byte budget divided
by the bytes of a token's logits on this rank, so memory is flat in tokens and vocabulary.

One call of the fused loss: buffers, the walk over the tiles, and what it leaves for the backward pass.

The tile's logits of both models are formed, its token losses evaluated along one of three paths (Triton's kernels, a
shared softmax, separate ones), which turn the student's logits into their gradient in place, and two more products give
the gradients of the hidden states and of the weight. Collectives: those of the path, a tile; one all-gather before and
one reduce-scatter in backward under sequence parallelism, else one all-reduce in backward.
"""

from dataclasses import dataclass, replace
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.losses import separate_softmaxes, shared_softmax, triton_path
from megatron_kd.losses.tile_buffers import HeadLogits, TileDtypes, TilePlan, Workspace, bytes_per_logit, work_dtype
from megatron_kd.losses.tile_terms import Problem, TensorParallel, Tile, TokenLosses, row_blocks
from megatron_kd.losses.types import (
    LM_ONLY,
    DenseKnowledge,
    DistillationObjective,
    LossOutput,
    OutputHead,
    SparseKnowledge,
)
from megatron_kd.losses.weight_gradient import WeightGradient


@dataclass
class TileWalk:
    """One call: its inputs, its buffers, its results.

    ``labels`` and ``weights`` [n] of all tokens; ``tile_bytes`` the budget; ``triton``: where the kernels can express
    the call, they serve it.
    """

    head: OutputHead
    labels: Tensor
    weights: Tensor
    knowledge: DenseKnowledge | SparseKnowledge | None
    problem: Problem
    tensor_parallel: TensorParallel
    sequence_parallel: bool
    tile_bytes: int
    with_gradient: bool
    triton: bool
    workspace: Workspace | None
    output: LossOutput | None = None
    delivered: bool = False
    grad_hidden: Tensor | None = None
    grad_bias: Tensor | None = None
    weight_gradient: WeightGradient | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Walk the tiles; the loss sum. Leaves ``output`` and, with gradients, what ``backward`` delivers."""
        self.shape = hidden.shape
        full = self.tensor_parallel.gather_sequence(hidden) if self.sequence_parallel else hidden
        tokens = full.reshape(-1, full.shape[-1]).to(self.head.weight.dtype)
        self._check(tokens)
        self.student = HeadLogits(self.head, 0, self.head.rows_below(self.problem.student_vocab_size))
        self.teacher = self._teacher_logits()
        self._plan(tokens.shape[0])
        self._prepare_gradients(hidden, tokens)
        losses = []
        for start in range(0, tokens.shape[0], self.plan.tokens):
            losses.append(self._tile(tokens, slice(start, min(start + self.plan.tokens, tokens.shape[0]))))
        self._buffers = None
        return self._sum_up(losses)

    def backward(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias."""
        scale = self.problem.gradient_scale
        self.delivered = True
        in_main_grad = self.weight_gradient is not None and self.weight_gradient.into_main_grad
        if in_main_grad and upstream.float().item() != torch.tensor(scale, dtype=torch.float32).item():
            raise RuntimeError(
                f"the gradient that arrived at the loss is {upstream.item()}, but gradient_scale={scale} was declared "
                f"and has gone into main_grad already: pass gradient_scale={upstream.item()}"
            )
        factor = upstream / scale
        grad_hidden = grad_weight = grad_bias = None
        if self.grad_hidden is not None:
            grad_hidden, self.grad_hidden = self.grad_hidden.mul_(factor), None
            if self.sequence_parallel:
                grad_hidden = grad_hidden.reshape(-1, *self.shape[1:])
                grad_hidden = self.tensor_parallel.scatter_sequence(grad_hidden)
            else:
                self.tensor_parallel.sum_(grad_hidden)
            grad_hidden = grad_hidden.reshape(self.shape)
        if self.weight_gradient is not None:
            grad_weight = self.weight_gradient.deliver(factor)
        if self.grad_bias is not None:
            grad_bias = (self.grad_bias * factor).to(self.head.bias.dtype)
        return grad_hidden, grad_weight, grad_bias

    def _check(self, tokens: Tensor) -> None:
        head, n, size = self.head, tokens.shape[0], self.tensor_parallel.size
        if n == 0:
            raise ConfigError("the loss was given no tokens: hidden states of shape " + str(tuple(self.shape)))
        if tokens.shape[1] != head.weight.shape[1]:
            raise ConfigError(
                f"hidden states of size {tokens.shape[1]} do not fit a head of size {head.weight.shape[1]}"
            )
        for name, given in (("labels", self.labels), ("token_weights", self.weights)):
            if given.shape[0] != n:
                raise ConfigError(f"{name} has {given.shape[0]} tokens, the hidden states have {n}")
        if isinstance(self.knowledge, SparseKnowledge) and self.knowledge.ids.shape[0] != n:
            raise ConfigError(f"the sparse knowledge has {self.knowledge.ids.shape[0]} tokens, not {n}")
        rows, first = head.weight.shape[0], self.tensor_parallel.rank * head.weight.shape[0]
        if head.vocab_start != first or head.valid_vocab_size > size * rows:
            raise LayoutError(
                f"{rows} rows of an output weight on each of {size} tensor-parallel ranks cannot be those from id "
                f"{head.vocab_start} on (here they begin at {first}) of a vocabulary of {head.valid_vocab_size}"
            )

    def _teacher_logits(self) -> HeadLogits | None:
        if not isinstance(self.knowledge, DenseKnowledge):
            return None
        head, hidden = self.knowledge.head, self.knowledge.hidden
        self.teacher_tokens = hidden.detach().reshape(-1, hidden.shape[-1]).to(head.weight.dtype)
        if self.teacher_tokens.shape != (self.labels.shape[0], head.weight.shape[1]):
            raise ConfigError(
                f"teacher hidden states [{', '.join(map(str, self.teacher_tokens.shape))}] do not fit "
                f"{self.labels.shape[0]} tokens and a head of size {head.weight.shape[1]}"
            )
        first, rows = self.problem.vocab_start - head.vocab_start, self.problem.common_columns
        if rows and (first < 0 or first + rows > head.weight.shape[0]):
            raise LayoutError(
                f"the teacher's output weight has the ids {head.vocab_start} to "
                f"{head.vocab_start + head.weight.shape[0] - 1} on this rank, the student's needs "
                f"{self.problem.vocab_start} to {self.problem.vocab_start + rows - 1}: "
                f"shard it by the student's intervals"
            )
        return HeadLogits(head, max(first, 0), rows)

    def _plan(self, n: int) -> None:
        """How tiles are kept and evaluated; their buffers."""
        weight = self.head.weight
        heads = [logits for logits in (self.student, self.teacher) if logits is not None]
        dtypes = [logits.weight.dtype for logits in heads]
        by_kernels = self.triton and torch.float64 not in dtypes
        by_kernels = by_kernels and triton_path.has_kernels(self.problem, self.knowledge)
        self.path = self._path(by_kernels)
        self.dtypes = TileDtypes.of(
            dtypes, kernels_read_narrow=by_kernels and all(triton_path.reads_narrow(logits) for logits in heads),
            widens_by_block=self.tensor_parallel.size == 1 and weight.device.type == "cpu",
        )  # fmt: skip
        self.plan = TilePlan.of(
            self.tile_bytes, n, weight.shape[0], self.dtypes.evaluated.itemsize,
            bytes_per_logit(dtypes, self.dtypes.stored),
        )  # fmt: skip
        workspace = self.workspace or Workspace()
        self._buffers = [
            logits and workspace.take(
                name, (self.plan.tokens, logits.weight.shape[0]), self.dtypes.stored, weight.device
            )
            for name, logits in (("student", self.student), ("teacher", self.teacher))
        ]  # fmt: skip

    def _path(self, by_kernels: bool) -> ModuleType:
        if by_kernels:
            return triton_path
        return shared_softmax if shared_softmax.applies(self.problem, self.teacher is not None) else separate_softmaxes

    def _prepare_gradients(self, hidden: Tensor, tokens: Tensor) -> None:
        head = self.head
        if not self.with_gradient:
            return
        if hidden.requires_grad:
            self.grad_hidden = torch.empty_like(tokens)
        if head.weight.requires_grad:
            if self.delivered and self.weight_gradient is not None and self.weight_gradient.into_main_grad:
                raise RuntimeError("backward cannot run twice on a loss whose gradient has gone into main_grad")
            self.weight_gradient = WeightGradient(head.weight, self.student.weight.shape[0], self.plan.temporary_bytes)
        if head.bias is not None and head.bias.requires_grad:
            self.grad_bias = torch.zeros(head.bias.shape, dtype=work_dtype(head.bias.dtype), device=head.bias.device)

    def _tile(self, tokens: Tensor, rows: slice) -> TokenLosses:
        n = rows.stop - rows.start
        student, teacher = (None if buffer is None else buffer[:n] for buffer in self._buffers)
        self.student.product(tokens[rows], student)
        if teacher is not None:
            self.teacher.product(self.teacher_tokens[rows], teacher)
        parts = [slice(0, n)]
        if self.dtypes.by_block:
            parts = list(row_blocks(n, student.shape[1], self.plan.block_elements))
        losses = [self._evaluate(student, teacher, rows.start, part) for part in parts]
        if self.with_gradient:
            self._linear_gradients(student, tokens, rows)
        return _concatenate(losses)

    def _evaluate(self, student: Tensor, teacher: Tensor | None, offset: int, part: slice) -> TokenLosses:
        """Losses of the rows ``part`` of a tile, whose logits become their gradient."""
        at = slice(offset + part.start, offset + part.stop)
        student_rows = student[part].to(self.dtypes.evaluated)
        self.student.finish(student_rows)
        tile = Tile(student_rows, self.labels[at], self.weights[at].to(work_dtype(self.dtypes.evaluated)))
        if teacher is not None:
            tile.teacher = teacher[part].to(self.dtypes.evaluated)
            self.teacher.finish(tile.teacher)
        if isinstance(self.knowledge, SparseKnowledge):
            known = self.knowledge
            tile.sparse = replace(known, ids=known.ids[at], weights=known.weights[at], tail_mass=known.tail_mass[at])
        losses = self.path.evaluate(
            tile, self.problem, self.tensor_parallel, self.with_gradient, self.plan.block_elements
        )
        if self.with_gradient and self.dtypes.by_block:
            student[part].copy_(tile.student)
        return losses

    def _linear_gradients(self, gradient: Tensor, tokens: Tensor, rows: slice) -> None:
        if self.grad_bias is not None:
            self.grad_bias[: gradient.shape[1]] += gradient.sum(0, dtype=self.grad_bias.dtype)
        gradient = gradient.to(tokens.dtype)
        if self.grad_hidden is not None:
            torch.mm(gradient, self.student.weight, out=self.grad_hidden[rows])
        if self.weight_gradient is not None:
            self.weight_gradient.add(gradient, tokens[rows])

    def _sum_up(self, parts: list[TokenLosses]) -> Tensor:
        losses = _concatenate(parts)
        objective = self.problem.objective
        counted = self.weights != 0
        weights = self.weights.to(losses.lm.dtype)

        def total(values: Tensor | None) -> Tensor | None:
            return None if values is None else (torch.where(counted, values, 0.0) * weights).sum()

        lm_sum, kd_sum = total(losses.lm), total(losses.kd)
        # a term without weight is left out: it may be infinite (a label that the student does not have)
        loss_sum = lm_sum * objective.lm_weight if objective.lm_weight else torch.zeros_like(lm_sum)
        if kd_sum is not None and objective.kd_weight:
            loss_sum = loss_sum + kd_sum * objective.kd_factor
        tail = self.knowledge.tail_mass if isinstance(self.knowledge, SparseKnowledge) else None
        self.output = LossOutput(  # detached: with its graph, which holds this walk, it would be freed by gc alone
            loss_sum=loss_sum.detach(), token_count=counted.sum(), lm_sum=lm_sum, kd_sum=kd_sum,
            teacher_entropy_sum=total(losses.entropy), tail_mass_sum=total(tail),
            token_lm_losses=None if self.with_gradient else torch.where(counted, losses.lm, 0.0),
        )  # fmt: skip
        return loss_sum


def _concatenate(parts: list[TokenLosses]) -> TokenLosses:
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Tensor | None:
        return None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])

    return TokenLosses(joined("lm"), joined("kd"), joined("entropy"))


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
        tile_bytes: memory of the logit tiles of both models and their temporaries
            (:mod:`~megatron_kd.losses.tile_buffers` says what is counted); None for ``DEFAULT_TILE_BYTES``.
        backend: ``torch``, ``triton`` or ``auto``.
        gradient_scale: the gradient that will arrive at ``loss_sum``. It must be right if the weight has
            ``main_grad``, which is added to before backward; backward checks it.
        workspace: keeps the tile buffers for the next call on the CPU; None frees them.

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
    walk = TileWalk(
        head, labels.reshape(-1), token_weights.reshape(-1), knowledge,
        _problem(head, knowledge, objective, gradient_scale), TensorParallel(tp_group), sequence_parallel,
        tile_bytes or DEFAULT_TILE_BYTES["cuda" if head.weight.is_cuda else "cpu"], with_gradient,
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
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, walk: TileWalk) -> Tensor:
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
