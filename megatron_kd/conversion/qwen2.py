"""Qwen2ForCausalLM: the mapping table, and its config.json in both directions.

``rope_theta`` stands at the top level of config.json in transformers 4 and inside ``rope_parameters`` in
transformers 5: both are written, either is read.
"""

from typing import Any, Mapping

from megatron_kd.conversion.rules import MergeGateUp, MergeQKV, Rename, Vocabulary
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture

HF_ARCHITECTURE = "Qwen2ForCausalLM"
_MCORE, _HF = "decoder.layers.{layer}", "model.layers.{layer}"


def qwen2_rules(architecture: ModelArchitecture, fused_norms: bool = False) -> tuple[Rename, ...]:
    """The table, in the model's order.

    Args:
        architecture: decides whether there is an output layer of its own and a bias on Q, K and V.
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


def hf_config(architecture: ModelArchitecture, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """config.json of ``architecture``.

    Args:
        architecture: with its vocabulary size filled in.
        dtype: of the tensors, as torch calls it (``float32``).
        eos_token_id: ends a document; there is no separate bos.

    Raises:
        CheckpointError: Qwen2ForCausalLM cannot express it.
    """
    if architecture.qk_layernorm or not architecture.add_qkv_bias:
        raise CheckpointError(
            f"{HF_ARCHITECTURE} has a bias on Q, K and V and no norm on Q and K; this model has "
            f"add_qkv_bias={architecture.add_qkv_bias} and qk_layernorm={architecture.qk_layernorm}"
        )
    return {
        "architectures": [HF_ARCHITECTURE],
        "model_type": "qwen2",
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.max_position_embeddings,
        "initializer_range": architecture.init_std,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rope_theta,
        "rope_parameters": {"rope_theta": architecture.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def architecture_from_hf(config: Mapping[str, Any], where: str) -> ModelArchitecture:
    """The architecture that a config.json describes.

    Args:
        config: its content.
        where: what to call it in an error.

    Raises:
        CheckpointError: another family, a key that is missing, or a feature that is not supported.
    """
    if config.get("model_type") != "qwen2":
        raise CheckpointError(f"{where}: model_type is '{config.get('model_type')}', where 'qwen2' is supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"{where}: scaled rotary embeddings ({dict(rope)}) are not supported")
    if config.get("use_sliding_window"):
        raise CheckpointError(f"{where}: sliding-window attention is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is '{config['hidden_act']}', where 'silu' is supported")
    try:
        heads = config["num_attention_heads"]
        return ModelArchitecture(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            vocab_size=config["vocab_size"],
            kv_channels=config.get("head_dim") or 0,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            init_std=config.get("initializer_range", 0.02),
            max_position_embeddings=config.get("max_position_embeddings", 32_768),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: key {error} is missing") from None
