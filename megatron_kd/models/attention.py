"""Attention of the local layer spec: ``torch.nn.functional.scaled_dot_product_attention`` and two special cases.

Megatron-Core's own unfused attention materialises [batch, heads, sequence, sequence] scores and takes its workspace
from global state. This one does neither, so it runs on any device with explicitly passed groups.

On a CPU, short causal sequences in fp32 run as batched matrix products over blocks of query rows: a block attends only
to the keys up to its end, so little above the diagonal is computed. The probabilities are kept for the backward pass
(heads x sequence² / 2 numbers), which limits it to short sequences; torch's CPU kernel recomputes them and is slower.

While decoding, a cache holds rotated keys side by side in memory. Megatron-Core's static cache holds them as they come
out of the projection and rotates all of them again for every token.
"""

import math

import torch
import torch.distributed as dist
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from megatron_kd.models.local_modules import rotate
from megatron_kd.parallel.groups import join_positions, slice_numbers


class SDPACoreAttention(torch.nn.Module):
    """Causal self-attention with grouped queries, with Megatron-Core's shapes and constructor arguments."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ):
        super().__init__()
        self._context_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "context parallelism needs process groups"
            self._context_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.is_grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
        **_: object,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sequence, batch, heads, width]. key, value: [sequence, batch, query groups, width].
            attention_mask: [batch, 1, sequence, sequence] boolean, True where attention is forbidden; None is causal.
                Must be None under context parallelism, where the sequence is this rank's part of it.

        Returns:
            [sequence, batch, heads x width].
        """
        if self._context_group is not None:
            return self._attend_to_all_ranks(query, key, value, self._context_group)
        if query.shape[0] == 1 and attention_mask is None:
            return self._attend_with_one_query(query, key, value)
        if self._suits_blocks(query, key, attention_mask):
            return self._attend_in_blocks(query, key, value)
        return self._attend(query, key, value, None if attention_mask is None else ~attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Call torch's kernel; ``mask`` is True where attention is allowed, None is causal."""
        context = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=self.is_grouped,
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend_to_all_ranks(self, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Attend with each half of this rank's queries to all keys up to it, gathered from the context-parallel ranks.

        Keys and values are whole on every rank, queries are not (as in Llama 3, arXiv 2407.21783, section 3.3.2).
        """
        both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=group)
        keys, values = join_positions(both, group.size()).unbind(1)
        half = query.shape[0] // 2
        return torch.cat(
            [
                self._attend(queries, keys[:end], values[:end], causal_lower_right(half, end))
                for queries, end in zip(
                    query.split(half), ((number + 1) * half for number in slice_numbers(group.size(), group.rank()))
                )
            ]
        )

    def _attend_with_one_query(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend to all that is cached; the heads of a group stand in for queries, so that its keys are read once."""
        _, batch, heads, width = query.shape
        context = scaled_dot_product_attention(
            query.view(batch, key.shape[2], -1, width),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
        )
        return context.reshape(1, batch, heads * width)

    def _suits_blocks(self, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> bool:
        return (
            query.device.type == "cpu"
            and query.dtype == torch.float32
            and 1 < query.shape[0] == key.shape[0] <= MAX_SEQUENCE
            and attention_mask is None
            and not self.is_grouped
            and not (self.training and self.dropout)
        )

    def _attend_in_blocks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, batch, heads, width = query.shape
        query, key, value = (x.reshape(length, batch * heads, width) for x in (query, key, value))
        context = blocked_causal_attention(query, key, value, self.softmax_scale)
        return context.view(length, batch, heads * width)


BLOCK_ROWS = 64
MAX_SEQUENCE = 1024


def blocked_causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale · Q Kᵀ + causal mask) V for every head.

    Args:
        query, key, value: [sequence, heads, width], the last dimension contiguous; heads may run over a batch.

    Returns:
        [sequence, heads, width].
    """
    return _BlockedCausalAttention.apply(query, key, value, scale)


class _BlockedCausalAttention(torch.autograd.Function):
    """Blocked attention; with the kept probabilities P, dP = dO Vᵀ and dS = P ∘ (dP − rowsum(P ∘ dP))."""

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
        # Products are added with add_: baddbmm_ into a slice makes one small product per head, with threads of its own.
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


class CachingSelfAttention(SelfAttention):
    """Megatron-Core's self-attention with a cache of its own; ``generation/decoder.py`` calls its parts."""

    def extend(
        self, context: BaseInferenceContext, query: Tensor, key: Tensor, value: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate the next tokens' keys and queries, and append to the cache.

        Args:
            context: holds the cache's memory, its length and its capacity.
            query: [n, b, heads, width] of the next n tokens. key, value: [n, b, query groups, width].
            angles: of all positions, always the same object.

        Returns:
            The rotated query, and all keys and values so far, [length, b, query groups, width].
        """
        start = context.sequence_len_offset
        end = start + key.shape[0]
        query, key = (rotate(values, angles, start, end) for values in (query, key))
        keys, values = self._memory(context, key)
        keys[:, :, start:end], values[:, :, start:end] = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        if start == 0:
            return query, key, value
        return query, keys[:, :, :end].permute(2, 0, 1, 3), values[:, :, :end].permute(2, 0, 1, 3)

    def _memory(self, context: BaseInferenceContext, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory of this layer's keys and values, [b, query groups, max length, width] each."""
        memory = context.key_value_memory_dict
        if self.layer_number not in memory:
            _, batch, groups, width = like.shape
            shape = (batch, groups, context.max_sequence_length, width)
            memory[self.layer_number] = torch.empty(2, *shape, dtype=like.dtype, device=like.device).unbind()
        return memory[self.layer_number]
