"""KV-cached forward passes of a model on its own tensor x pipeline layout, on Megatron-Core's inference path.

    tokens [b, n] -> stage 0 -> … -> last stage -> logits of the next token [b, v], whole on its tensor-parallel ranks

Every rank of a model calls in step with the others. Collectives: those of the layers, a point-to-point send between
neighbouring stages, one all-gather of [b, v / TP] logits.
"""

from typing import ContextManager, Sequence

import torch
import torch.distributed as dist
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.generation.decoding_mode import decoding_mode
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage


class Decoder:
    """One batch of sequences in decoding: a cache of keys and values that grows from call to call.

    Args:
        chunks: the model's chunks on this rank (not DDP-wrapped).
        groups: of its layout.
        batch_size, max_length: the most sequences, and the most tokens of each, that the cache holds.
        vocab_size: ids that may be drawn; None means all of the model's. A tokenizer may have fewer.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenStateGPTModel],
        groups: ProcessGroupCollection,
        batch_size: int,
        max_length: int,
        vocab_size: int | None = None,
    ) -> None:
        self._chunks = list(chunks)
        self.groups = groups
        self._context = StaticInferenceContext(batch_size, max_length)
        self._context.materialize_only_last_token_logits = False
        valid = chunks[-1].valid_vocab_size
        self.valid_vocab_size = valid if vocab_size is None else min(valid, vocab_size)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._context.sequence_len_offset

    def decoding(self) -> ContextManager[None]:
        """The mode in which :meth:`next_token_logits` works."""
        return decoding_mode(self._chunks)

    def next_token_logits(self, tokens: Tensor) -> Tensor | None:
        """Append ``tokens`` [b, n] to every sequence; fp32 logits [b, v] of what follows, None before the last stage.

        The first call may have any n; the others take one token a sequence.
        """
        if self.length and tokens.shape[1] != 1:
            raise ValueError(f"decoding goes on token by token, not by {tokens.shape[1]}")
        offset = self._context.sequence_len_offset
        positions = torch.arange(offset, offset + tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self._forward(tokens, positions)
        self._context.sequence_len_offset += tokens.shape[1]
        self._context.enable_decode_mode()
        return None if hidden is None else self._logits(hidden)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Through all stages in turn (all virtual stages too); the last token's hidden states on the last stage."""
        pipeline, hidden = self.groups.pp, None
        rank, size = pipeline.rank(), pipeline.size()
        shape = (tokens.shape[1], tokens.shape[0], self._chunks[0].config.hidden_size)
        for number, chunk in enumerate(self._chunks):
            if size > 1 and not (rank == 0 and number == 0):
                received = torch.empty(shape, dtype=chunk.config.params_dtype, device=tokens.device)
                dist.recv(received, group=pipeline, group_src=(rank - 1) % size)
                chunk.set_input_tensor(received)
            hidden = chunk(tokens, positions, None, inference_context=self._context)
            if size > 1 and not (rank == size - 1 and number == len(self._chunks) - 1):
                dist.send(hidden.contiguous(), group=pipeline, group_dst=(rank + 1) % size)
        return hidden[-1] if is_last_stage(self.groups) else None

    def _logits(self, hidden: Tensor) -> Tensor:
        head, group = self._chunks[-1].output_head(), self.groups.tp
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
        if head.scale != 1.0:
            logits = logits * head.scale
        if head.final_softcap is not None:
            logits = head.final_softcap * torch.tanh(logits / head.final_softcap)
        if group.size() > 1:
            shards = [torch.empty_like(logits) for _ in range(group.size())]
            dist.all_gather(shards, logits.contiguous(), group=group)
            logits = torch.cat(shards, dim=-1)
        return logits[:, : self.valid_vocab_size]
