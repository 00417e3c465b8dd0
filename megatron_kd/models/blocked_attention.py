"""Causal attention for short sequences in fp32 on a CPU, as batched matrix products over blocks of query rows.

A block of rows attends only to the keys up to its end, so little above the diagonal is computed. The probabilities
are kept for the backward pass (heads x sequence² / 2 numbers), which limits it to short sequences; torch's own CPU
kernel recomputes them, which is slower there.
"""

import torch
from torch import Tensor

BLOCK_ROWS = 64
MAX_SEQUENCE = 1024


def blocked_causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ + causal mask) V for every head.

    Args:
        query, key, value: [sequence, heads, width], the last dimension contiguous; heads may run over a batch.

    Returns:
        [sequence, heads, width].
    """
    return _BlockedCausalAttention.apply(query, key, value, scale)


class _BlockedCausalAttention(torch.autograd.Function):
    """The backward pass with the kept probabilities P: dP = dO Vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP))."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length = query.shape[0]
        scaled = query * scale
        output = torch.empty_like(scaled)
        rows_q, rows_k, rows_v, rows_o = (x.transpose(0, 1) for x in (scaled, key, value, output))
        above = torch.full((BLOCK_ROWS, BLOCK_ROWS), float("-inf"), dtype=query.dtype).triu_(1)
        kept = []
        for start in range(0, length, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, length)
            scores = torch.bmm(rows_q[:, start:end], rows_k[:, :end].transpose(1, 2))
            scores[:, :, start:end].add_(above[: end - start, : end - start])
            probabilities = torch.softmax(scores, dim=-1, out=scores)
            rows_o[:, start:end] = torch.bmm(probabilities, rows_v[:, :end])
            kept.append(probabilities)
        ctx.scale = scale
        ctx.save_for_backward(scaled, key, value, *kept)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        scaled, key, value, *kept = ctx.saved_tensors
        length, heads, width = scaled.shape
        rows_q, rows_k, rows_v, rows_g = (x.transpose(0, 1) for x in (scaled, key, value, gradient))
        grad_q, grad_k, grad_v = (scaled.new_empty(heads, length, width) for _ in range(3))
        last = len(kept) - 1
        softmax_backward = torch.ops.aten._softmax_backward_data.out
        # Products are added with add_: baddbmm_ into a slice makes one small product a head, each with its own threads.
        for block in range(last, -1, -1):  # the last block reaches every key, so it writes and the others add
            start, end = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, length)
            probabilities, rows = kept[block], rows_g[:, start:end]
            grad_scores = torch.bmm(rows, rows_v[:, :end].transpose(1, 2))
            softmax_backward(grad_scores, probabilities, -1, grad_scores.dtype, grad_input=grad_scores)
            grad_q[:, start:end] = torch.bmm(grad_scores, rows_k[:, :end])
            if block == last:
                torch.bmm(probabilities.transpose(1, 2), rows, out=grad_v)
                torch.bmm(grad_scores.transpose(1, 2), rows_q[:, start:end], out=grad_k)
            else:
                grad_v[:, :end].add_(torch.bmm(probabilities.transpose(1, 2), rows))
                grad_k[:, :end].add_(torch.bmm(grad_scores.transpose(1, 2), rows_q[:, start:end]))
        return grad_q.mul_(ctx.scale).transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1), None
