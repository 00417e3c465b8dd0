"""Self-attention that caches rotated keys, for the local layer spec.

Megatron-Core's static cache holds keys as they come out of the projection, and rotates all of them again for every
token. This one rotates a key once, before it is cached, and keeps a sequence's keys side by side in memory.
"""

import torch
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_kd.models.rotary import rotate


class CachingSelfAttention(SelfAttention):
    """Megatron-Core's, with a cache of its own; generation/decoding_mode.py calls its parts."""

    def extend(
        self, context: BaseInferenceContext, query: Tensor, key: Tensor, value: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate, and append to the cache.

        Args:
            context: says how many tokens the cache holds and has room for; this layer's memory is kept in it.
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
        return query, *(memory[:, :, :end].permute(2, 0, 1, 3) for memory in (keys, values))

    def _memory(self, context: BaseInferenceContext, like: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's keys and values [b, query groups, max length, width]."""
        memory = context.key_value_memory_dict
        if self.layer_number not in memory:
            _, batch, groups, width = like.shape
            shape = (batch, groups, context.max_sequence_length, width)
            memory[self.layer_number] = torch.empty(2, *shape, dtype=like.dtype, device=like.device).unbind()
        return memory[self.layer_number]
