"""Attention on ``torch.nn.functional.scaled_dot_product_attention``, in the place of Megatron-Core's local one.

Megatron-Core's own unfused attention materialises [batch, heads, sequence, sequence] scores and takes its workspace
from global state; this one does neither, so it runs on any device with explicitly passed groups.
"""

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from megatron_kd.models.blocked_attention import MAX_SEQUENCE, blocked_causal_attention
from megatron_kd.parallel.context import in_order, part_numbers


class SDPACoreAttention(torch.nn.Module):
    """Causal self-attention with grouped queries; takes and gives Megatron-Core's shapes and constructor arguments."""

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
        self._context_group = pg_collection.cp if config.context_parallel_size > 1 else None
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
            return self._attend_to_all_ranks(query, key, value)
        if query.shape[0] == 1 and attention_mask is None:
            return self._attend_with_one_query(query, key, value)
        if self._suits_blocks(query, key, attention_mask):
            return self._attend_in_blocks(query, key, value)
        return self._attend(query, key, value, None if attention_mask is None else ~attention_mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` is True where attention is allowed; None is causal."""
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

    def _attend_to_all_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each half of this rank's queries to all keys up to it, gathered from the context-parallel ranks (as in Llama
        3's training, arXiv 2407.21783, section 3.3.2). Keys and values are whole on every rank, queries are not."""
        group = self._context_group
        both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=group)
        keys, values = in_order(both, group.size()).unbind(1)
        half = query.shape[0] // 2
        return torch.cat(
            [
                self._attend(queries, keys[:end], values[:end], causal_lower_right(half, end))
                for queries, end in zip(
                    query.split(half), ((number + 1) * half for number in part_numbers(group.size(), group.rank()))
                )
            ]
        )

    def _attend_with_one_query(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Decoding: it attends to all that is cached. The heads of a group stand in for queries, so that its keys are
        read once."""
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
        context = blocked_causal_attention(
            *(x.reshape(length, batch * heads, width) for x in (query, key, value)), self.softmax_scale
        )
        return context.view(length, batch, heads * width)
