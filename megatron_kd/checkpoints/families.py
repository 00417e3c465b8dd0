"""The model families by Hugging Face ``model_type``, and their config.json in both directions.

``rope_theta`` and the rotary scaling stand at the top level of config.json in transformers 4 (``rope_theta``,
``rope_scaling``) and inside ``rope_parameters`` in transformers 5: both are written, either is read.
"""

from dataclasses import dataclass
from typing import Any, Mapping

from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture

_MAX_LAYERS, _MAX_SIZE = 4096, 1 << 28


@dataclass(frozen=True)
class Family:
    """What all models of one ``model_type`` have in common.

    Attributes:
        hf_architecture: the class in transformers.
        covers: names that people know it by.
        head_dim: width of a head where config.json has none; 0 means hidden_size / num_attention_heads.
        sliding_window: of the models whose config.json does not say, where the family has windows at all.
        without: keys that must be absent or false, because they would add tensors that the table lacks.
    """

    hf_architecture: str
    covers: str
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    head_dim: int = 0
    sliding_window: int | None = None
    without: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", "Qwen1.5, Qwen2, Qwen2.5", add_qkv_bias=True, without=("use_sliding_window",)),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3",
        qk_layernorm=True,
        head_dim=128,
        without=("use_sliding_window", "attention_bias"),
    ),
    "llama": Family("LlamaForCausalLM", "Llama 2, 3, 3.1, 3.2", without=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", "Mistral", sliding_window=4096),
}


def family_of(architecture: ModelArchitecture) -> Family:
    """The family that an architecture is exported as.

    Raises:
        CheckpointError: there is none, or the family's class in transformers cannot express it.
    """
    family = FAMILIES.get(architecture.hf_model_type)
    if family is None:
        raise CheckpointError(
            f"'{architecture.hf_model_type}' is not a known family: choose one of {', '.join(FAMILIES)}"
        )
    faults = [
        f"{name}={getattr(architecture, name)}"
        for name in ("add_qkv_bias", "qk_layernorm")
        if getattr(architecture, name) != getattr(family, name)
    ]
    if architecture.sliding_window and family.sliding_window is None:
        faults.append(f"sliding_window={architecture.sliding_window}")
    if faults:
        raise CheckpointError(f"{family.hf_architecture} cannot express this model: it has {', '.join(faults)}")
    return family


def hf_config(
    architecture: ModelArchitecture, dtype: str, eos_token_id: int | None, bos_token_id: int | None = None
) -> dict[str, Any]:
    """config.json of ``architecture``.

    Args:
        architecture: with its vocabulary size filled in.
        dtype: of the tensors, as torch calls it (``float32``).
        eos_token_id: ends a document.
        bos_token_id: begins one; None means eos does.

    Raises:
        CheckpointError: the family's class cannot express it.
    """
    family = family_of(architecture)
    scaling = rope_scaling(architecture)
    config = {
        "architectures": [family.hf_architecture],
        "model_type": architecture.hf_model_type,
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
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": architecture.rope_theta, "rope_type": "default", **(scaling or {})},
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "attention_dropout": 0.0,
        "sliding_window": architecture.sliding_window,
        **{key: False for key in family.without},
        "bos_token_id": eos_token_id if bos_token_id is None else bos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if scaling is None:
        del config["rope_scaling"]
    return config


def rope_scaling(architecture: ModelArchitecture) -> dict[str, Any] | None:
    """``rope_scaling`` of config.json; None without scaling."""
    if architecture.rope_scaling_factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": architecture.rope_scaling_factor,
        "low_freq_factor": architecture.rope_low_freq_factor,
        "high_freq_factor": architecture.rope_high_freq_factor,
        "original_max_position_embeddings": architecture.rope_original_positions,
    }


def architecture_from_hf(config: Mapping[str, Any], where: str) -> ModelArchitecture:
    """The architecture that a config.json describes.

    Args:
        config: its content.
        where: what to call it in an error.

    Raises:
        CheckpointError: another family, a key that is missing or makes no sense, or a feature that is not supported.
    """
    reader = _Reader(config, where)
    family = _family_in(config, where)
    heads = reader.size("num_attention_heads")
    groups = reader.size("num_key_value_heads", heads)
    hidden = reader.size("hidden_size")
    head_dim = reader.size("head_dim", family.head_dim or max(1, hidden // heads))
    if heads % groups:
        raise CheckpointError(f"{where}: {heads} num_attention_heads do not divide by {groups} num_key_value_heads")
    if head_dim % 2:
        raise CheckpointError(f"{where}: head_dim {head_dim} is odd, which rotary embeddings cannot be")
    window = None if family.sliding_window is None else config.get("sliding_window", family.sliding_window)
    return ModelArchitecture(
        num_layers=reader.size("num_hidden_layers", limit=_MAX_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=reader.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=reader.size("vocab_size"),
        kv_channels=head_dim,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        add_qkv_bias=family.add_qkv_bias,
        qk_layernorm=family.qk_layernorm,
        norm_epsilon=reader.number("rms_norm_eps", 1e-6),
        init_std=reader.number("initializer_range", 0.02),
        max_position_embeddings=reader.size("max_position_embeddings", 32_768),
        sliding_window=None if window is None else reader.size("sliding_window", family.sliding_window),
        hf_model_type=config["model_type"],
        **_rope(reader),
    )


def _family_in(config: Mapping[str, Any], where: str) -> Family:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = "; ".join(f"{name} ({known.covers})" for name, known in FAMILIES.items())
        raise CheckpointError(f"{where}: model_type is {model_type!r}, where these are supported: {supported}")
    for key in family.without:
        if config.get(key):
            raise CheckpointError(f"{where}: {key}={config[key]!r} is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {config['hidden_act']!r}, where 'silu' is supported")
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantized weights are not supported: give the folder they were made from")
    return family


def _rope(reader: "_Reader") -> dict[str, Any]:
    """The architecture's rotary fields."""
    config, where = reader.config, reader.where
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{where}: rope_parameters or rope_scaling must be an object, not {rope!r}")
    inner = _Reader(rope, f"{where}: rotary settings")
    theta = inner.number("rope_theta", reader.number("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise CheckpointError(f"{where}: scaled rotary embeddings of type {kind!r} are not supported, only 'llama3'")
    fields = {
        "rope_theta": theta,
        "rope_scaling_factor": inner.number("factor"),
        "rope_low_freq_factor": inner.number("low_freq_factor"),
        "rope_high_freq_factor": inner.number("high_freq_factor"),
        "rope_original_positions": inner.size("original_max_position_embeddings"),
    }
    if not fields["rope_low_freq_factor"] < fields["rope_high_freq_factor"]:
        raise CheckpointError(f"{where}: rotary settings: low_freq_factor is not below high_freq_factor")
    return fields


class _Reader:
    """Typed values of a config.json, with errors that name the key."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def size(self, key: str, default: int | None = None, limit: int = _MAX_SIZE) -> int:
        """A whole number from 1 to ``limit``."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise CheckpointError(f"{self.where}: {key} must be a whole number from 1 to {limit}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.where}: {key} must be a number above 0, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where it is missing."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} must be true or false, not {value!r}")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where}: key '{key}' is missing")
        return value
