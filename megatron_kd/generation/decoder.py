"""KV-cached forward passes of a model on its own tensor x pipeline layout, on Megatron-Core's inference path.

    tokens [b, n] -> stage 0 -> … -> last stage -> logits of the next token [b, v], whole on its tensor-parallel ranks

Every rank of a model calls in step with the others. Collectives: those of the layers, a point-to-point send between
neighbouring stages, one all-gather of [b, v / TP] logits. In :func:`decoding_mode` a model differs from training.
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Callable, ContextManager, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import linear

from megatron_kd.models.attention import CachingSelfAttention
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage


class Decoder:
    """Decodes one batch of sequences: its cache of keys and values grows from call to call.

    Args:
        model_chunks: the model's chunks on this rank (not DDP-wrapped).
        groups: of its layout.
        batch_size, max_length: the most sequences, and the most tokens of each, that the cache holds.
        vocab_size: ids that may be drawn; None means all of the model's. A tokenizer may have fewer.
    """

    def __init__(
        self,
        model_chunks: Sequence[HiddenStateGPTModel],
        groups: ProcessGroupCollection,
        batch_size: int,
        max_length: int,
        vocab_size: int | None = None,
    ) -> None:
        self._model_chunks = list(model_chunks)
        self.groups = groups
        self._context = StaticInferenceContext(batch_size, max_length)
        self._context.materialize_only_last_token_logits = False
        valid = model_chunks[-1].valid_vocab_size
        self.valid_vocab_size = valid if vocab_size is None else min(valid, vocab_size)

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self._context.sequence_len_offset

    def decoding(self) -> ContextManager[None]:
        """Return the context in which :meth:`next_token_logits` works."""
        return decoding_mode(self._model_chunks)

    def next_token_logits(self, tokens: Tensor) -> Tensor | None:
        """Append ``tokens`` [b, n]; return fp32 logits [b, v] of what follows, None before the last stage.

        The first call may have any n; later ones take one token per sequence.
        """
        if self.length and tokens.shape[1] != 1:
            raise ValueError(f"after the prompt, decoding takes one token at a time, not {tokens.shape[1]}")
        offset = self._context.sequence_len_offset
        positions = torch.arange(offset, offset + tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self._forward(tokens, positions)
        self._context.sequence_len_offset += tokens.shape[1]
        self._context.enable_decode_mode()
        return None if hidden is None else self._logits(hidden)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Pass all stages in turn, virtual ones too; return the last token's hidden states on the last stage."""
        pipeline, hidden = self.groups.pp, None
        rank, size = pipeline.rank(), pipeline.size()
        shape = (tokens.shape[1], tokens.shape[0], self._model_chunks[0].config.hidden_size)
        for number, model_chunk in enumerate(self._model_chunks):
            if size > 1 and not (rank == 0 and number == 0):
                received = torch.empty(shape, dtype=model_chunk.config.params_dtype, device=tokens.device)
                dist.recv(received, group=pipeline, group_src=(rank - 1) % size)
                model_chunk.set_input_tensor(received)
            hidden = model_chunk(tokens, positions, None, inference_context=self._context)
            if size > 1 and not (rank == size - 1 and number == len(self._model_chunks) - 1):
                dist.send(hidden.contiguous(), group=pipeline, group_dst=(rank + 1) % size)
        return hidden[-1] if hidden is not None and is_last_stage(self.groups) else None

    def _logits(self, hidden: Tensor) -> Tensor:
        head, group = self._model_chunks[-1].output_head(), self.groups.tp
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


try:
    from megatron.core.inference.utils import InferenceMode
except ImportError:  # Megatron-Core before 0.19 looks at the context alone
    InferenceMode = None


@contextmanager
def decoding_mode(model_chunks: Sequence[HiddenStateGPTModel]) -> Iterator[None]:
    """Switch a model to decoding, and back at the end.

    No gradients, evaluation mode, no sequence parallelism (a single token cannot be split). The local spec's layers
    skip what only training needs: with one token per sequence, they spend more time on that than on products.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model_chunk in model_chunks:
            stack.callback(model_chunk.train, model_chunk.training)
            model_chunk.eval()
            layers = model_chunk.decoder.layers
            last = layers[-1] if model_chunk.post_process and len(layers) else None
            for owner in (model_chunk.config, *model_chunk.modules()):
                for name in ("sequence_parallel", "reduce_scatter_embeddings"):
                    if getattr(owner, name, None) is True:
                        stack.callback(setattr, owner, name, True)
                        setattr(owner, name, False)
                forward = _forward_of(owner)
                if forward is not None:
                    owner.forward = partial(forward, owner, **({"only_last": True} if owner is last else {}))
                    stack.callback(delattr, owner, "forward")
        if InferenceMode is not None:
            stack.enter_context(InferenceMode.active())
        yield


def _forward_of(module: torch.nn.Module) -> Callable[..., Any] | None:
    """Return the replacement of a module's forward; None leaves it, as in Transformer Engine's layers."""
    if isinstance(module, TransformerLayer):
        return _layer if type(module.self_attention) is CachingSelfAttention else None
    return {ColumnParallelLinear: _column_parallel, RowParallelLinear: _row_parallel}.get(type(module))


def _layer(
    layer: TransformerLayer,
    hidden_states: Tensor,
    rotary_pos_emb: Tensor,
    inference_context: BaseInferenceContext,
    only_last: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Run attention and MLP of a :func:`~megatron_kd.models.layer_specs.decoder_layer_spec` layer, on [n, b, hidden].

    Args:
        only_last: return the last token's hidden states alone, [1, b, hidden]; the others need only keys and values.
    """
    attention = layer.self_attention
    query, key, value = attention.get_query_key_value_tensors(layer.input_layernorm(hidden_states))
    query, key, value = attention.extend(inference_context, query, key, value, rotary_pos_emb)
    if only_last:
        query, hidden_states = query[-1:], hidden_states[-1:]
    hidden_states = attention.linear_proj(attention.core_attention(query, key, value))[0].add_(hidden_states)
    return layer.mlp(layer.pre_mlp_layernorm(hidden_states))[0].add_(hidden_states), None


def _column_parallel(layer: ColumnParallelLinear, values: Tensor) -> tuple[Tensor, Tensor | None]:
    if layer.skip_bias_add:
        return linear(values, layer.weight), layer.bias
    return linear(values, layer.weight, layer.bias), None


def _row_parallel(layer: RowParallelLinear, values: Tensor) -> tuple[Tensor, Tensor | None]:
    result = linear(values, layer.weight)
    if layer.tp_group.size() > 1:
        dist.all_reduce(result, group=layer.tp_group)
    if layer.skip_bias_add or layer.bias is None:
        return result, layer.bias
    return result.add_(layer.bias), None
