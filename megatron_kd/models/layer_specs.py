"""Layer specs: the modules of a decoder layer, Transformer Engine's or torch's with Megatron-Core's linear layers.

Both specs keep the same sharded key names, so a checkpoint written with one loads with the other.
"""

import functools
from typing import Literal

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kd.errors import ConfigError
from megatron_kd.models.architecture import LayerSpecName
from megatron_kd.models.attention import CachingSelfAttention, SDPACoreAttention
from megatron_kd.models.local_modules import RMSNorm, SwiGLU


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine can be imported on a machine with CUDA."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:  # noqa: BLE001 - a broken installation is as good as none
        return False
    return True


def choose_layer_spec(requested: LayerSpecName) -> Literal["te", "local"]:
    """Return the layer spec to use; ``auto`` means Transformer Engine where it works.

    Raises:
        ConfigError: Transformer Engine was asked for by name and does not work here.
    """
    if requested == "te" and not has_transformer_engine():
        raise ConfigError(
            "model.layer_spec is 'te', but Transformer Engine with CUDA is not available here: use 'auto'"
        )
    if requested == "auto":
        return "te" if has_transformer_engine() else "local"
    return requested


def decoder_layer_spec(
    kind: Literal["te", "local"], config: TransformerConfig, num_local_layers: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the spec of this pipeline stage's ``num_local_layers`` layers and of the norm that follows them."""
    if kind == "te":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.module = CachingSelfAttention
    attention = parts.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    _mlp_submodules(parts.mlp).activation_func = SwiGLU  # built where config.use_te_activation_func is set
    assert attention.linear_qkv is LocalSpecProvider().column_parallel_linear()
    return TransformerBlockSubmodules(layer_specs=[layer] * num_local_layers, layer_norm=RMSNorm)


def _mlp_submodules(mlp: ModuleSpec | functools.partial) -> MLPSubmodules:
    """Return the submodules of an MLP's spec (Megatron-Core 0.16) or partial function (0.19)."""
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
