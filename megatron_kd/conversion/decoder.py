"""The mapping table of Llama-like decoders: which mcore tensor holds which Hugging Face tensors.

Qwen1.5, Qwen2, Qwen2.5, Qwen3, Llama and Mistral have the same tensors under the same names; they differ in a bias on
Q, K and V, norms on Q and K, and whether the output layer is the embedding: ``families.py`` reads it from config.json.
"""

from typing import Any, Mapping

from megatron_kd.conversion.rules import MergeGateUp, MergeQKV, Rename, Vocabulary
from megatron_kd.models.architecture import ModelArchitecture

_MCORE, _HF = "decoder.layers.{layer}", "model.layers.{layer}"


def decoder_rules(architecture: ModelArchitecture, fused_norms: bool = False) -> tuple[Rename, ...]:
    """The table, in the model's order.

    Args:
        architecture: decides whether there is an output layer of its own, a bias on Q, K and V, and norms on Q and K.
        fused_norms: the names of the Transformer Engine spec, whose norms belong to the linear layers after them.
    """
    attention = f"{_MCORE}.self_attention"
    qkv = [f"{_HF}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    input_norm = f"{attention}.linear_qkv.layer_norm_weight" if fused_norms else f"{_MCORE}.input_layernorm.weight"
    mlp_norm = f"{_MCORE}.mlp.linear_fc1.layer_norm_weight" if fused_norms else f"{_MCORE}.pre_mlp_layernorm.weight"
    rules = [
        Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
        Rename(input_norm, (f"{_HF}.input_layernorm.weight",)),
        MergeQKV(f"{attention}.linear_qkv.weight", tuple(f"{name}.weight" for name in qkv)),
    ]
    if architecture.add_qkv_bias:
        rules.append(MergeQKV(f"{attention}.linear_qkv.bias", tuple(f"{name}.bias" for name in qkv)))
    if architecture.qk_layernorm:
        rules += [
            Rename(f"{attention}.{part}_layernorm.weight", (f"{_HF}.self_attn.{part}_norm.weight",))
            for part in ("q", "k")
        ]
    rules += [
        Rename(f"{attention}.linear_proj.weight", (f"{_HF}.self_attn.o_proj.weight",)),
        Rename(mlp_norm, (f"{_HF}.post_attention_layernorm.weight",)),
        MergeGateUp(f"{_MCORE}.mlp.linear_fc1.weight", (f"{_HF}.mlp.gate_proj.weight", f"{_HF}.mlp.up_proj.weight")),
        Rename(f"{_MCORE}.mlp.linear_fc2.weight", (f"{_HF}.mlp.down_proj.weight",)),
        Rename("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not architecture.tie_word_embeddings:
        rules.append(Vocabulary("output_layer.weight", ("lm_head.weight",)))
    return tuple(rules)


def uses_fused_norms(state: Mapping[str, Any]) -> bool:
    """Whether mcore tensors carry the names of the Transformer Engine spec."""
    return any(name.endswith("linear_qkv.layer_norm_weight") for name in state)
