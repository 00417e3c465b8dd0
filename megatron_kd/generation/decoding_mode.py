"""What is different in a model while it decodes, undone at the end."""

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import linear

from megatron_kd.models.cached_attention import CachingSelfAttention
from megatron_kd.models.gpt import HiddenStateGPTModel

try:
    from megatron.core.inference.utils import InferenceMode
except ImportError:  # Megatron-Core before 0.19 looks at the context alone
    InferenceMode = None


@contextmanager
def decoding_mode(chunks: Sequence[HiddenStateGPTModel]) -> Iterator[None]:
    """No gradients, evaluation mode, no sequence parallelism (a single token cannot be split). The local spec's layers
    do without what only training needs: with one token a sequence, they spend more time on that than on products."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for chunk in chunks:
            stack.callback(chunk.train, chunk.training)
            chunk.eval()
            last = chunk.decoder.layers[-1] if chunk.post_process and len(chunk.decoder.layers) else None
            for owner in (chunk.config, *chunk.modules()):
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
    """What takes the place of a module's own forward; None leaves it, as in Transformer Engine's layers."""
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
    """Attention and MLP of :func:`~megatron_kd.models.layer_specs.decoder_layer_spec`, [n, b, hidden] -> the same.

    Args:
        only_last: give the last token's alone [1, b, hidden]; of the others only keys and values are needed.
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
