"""Model families: the models of one Hugging Face ``model_type``, as this project reads and writes them.

To add one, derive from :class:`Family`, or from :class:`LlamaLike` for decoders with the same layers, in a file of its
own, and add an instance to ``FAMILIES`` in ``families.py``. ``docs/extending.md`` has an example.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Mapping

from megatron_kd.checkpoints.rules import MergeGateUp, MergeQKV, Rename, Rule, Vocabulary
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture

LARGEST_SIZE, MOST_LAYERS = 1 << 28, 4096


class ConfigReader:
    """Typed values of a config.json, with errors that name the key.

    Attributes:
        config: its content.
        where: what errors call it.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def size(self, key: str, default: int | None = None, limit: int = LARGEST_SIZE) -> int:
        """Return a whole number from 1 to ``limit``."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise CheckpointError(f"{self.where}: {key} must be a whole number from 1 to {limit}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number above 0."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.where}: {key} must be a number above 0, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false; false where the key is missing."""
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


@dataclass(frozen=True)
class Family(ABC):
    """The models of one ``model_type``.

    Attributes:
        model_type: as config.json has it.
        hf_class: the class in transformers.
        covers: names that people know the models by.
        starts_with_bos: whether their texts begin with a bos token.
    """

    model_type: str
    hf_class: str
    covers: str
    starts_with_bos: bool = field(default=False, kw_only=True)

    @abstractmethod
    def read_config(self, reader: ConfigReader) -> ModelArchitecture:
        """Return the architecture that a config.json describes.

        Raises:
            CheckpointError: a key is missing, has an impossible value, or asks for what is not supported.
        """

    @abstractmethod
    def write_config(self, architecture: ModelArchitecture) -> dict[str, Any]:
        """Return the keys of config.json that describe the architecture."""

    @abstractmethod
    def rules(self, architecture: ModelArchitecture) -> list[Rule]:
        """Return one rule per mcore tensor, in the model's order."""

    def inexpressible(self, architecture: ModelArchitecture) -> list[str]:
        """Return what the class in transformers cannot express of an architecture, ``field=value`` each."""
        return []


@dataclass(frozen=True)
class LlamaLike(Family):
    """A decoder with Llama's layers: RoPE, RMSNorm, SwiGLU, grouped queries. Qwen, Llama and Mistral are variants.

    They have the same tensors under the same names. ``rope_theta`` and the rotary scaling stand at the top level of
    config.json in transformers 4 (``rope_theta``, ``rope_scaling``) and inside ``rope_parameters`` in transformers 5:
    both are written, either is read.

    Attributes:
        add_qkv_bias: whether Q, K and V have a bias.
        qk_layernorm: whether Q and K are normalized per head.
        head_dim: width of a head where config.json does not say; 0 means hidden_size / num_attention_heads.
        sliding_window: the window where config.json does not say; None for families without windows.
        unsupported: keys that must be absent or false, because they add tensors that the table lacks.
    """

    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    head_dim: int = 0
    sliding_window: int | None = None
    unsupported: tuple[str, ...] = ()

    def inexpressible(self, architecture: ModelArchitecture) -> list[str]:
        faults = [
            f"{name}={getattr(architecture, name)}"
            for name in ("add_qkv_bias", "qk_layernorm")
            if getattr(architecture, name) != getattr(self, name)
        ]
        if architecture.sliding_window and self.sliding_window is None:
            faults.append(f"sliding_window={architecture.sliding_window}")
        return faults

    def read_config(self, reader: ConfigReader) -> ModelArchitecture:
        config, where = reader.config, reader.where
        for key in self.unsupported:
            if config.get(key):
                raise CheckpointError(f"{where}: {key}={config[key]!r} is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{where}: hidden_act is {config['hidden_act']!r}, where 'silu' is supported")
        heads = reader.size("num_attention_heads")
        groups = reader.size("num_key_value_heads", heads)
        hidden = reader.size("hidden_size")
        head_dim = reader.size("head_dim", self.head_dim or max(1, hidden // heads))
        if heads % groups:
            raise CheckpointError(f"{where}: {heads} num_attention_heads do not divide by {groups} num_key_value_heads")
        if head_dim % 2:
            raise CheckpointError(f"{where}: head_dim {head_dim} is odd, which rotary embeddings cannot be")
        window = None if self.sliding_window is None else config.get("sliding_window", self.sliding_window)
        return ModelArchitecture(
            num_layers=reader.size("num_hidden_layers", limit=MOST_LAYERS),
            hidden_size=hidden,
            ffn_hidden_size=reader.size("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=groups,
            vocab_size=reader.size("vocab_size"),
            kv_channels=head_dim,
            tie_word_embeddings=reader.flag("tie_word_embeddings"),
            add_qkv_bias=self.add_qkv_bias,
            qk_layernorm=self.qk_layernorm,
            norm_epsilon=reader.number("rms_norm_eps", 1e-6),
            init_std=reader.number("initializer_range", 0.02),
            max_position_embeddings=reader.size("max_position_embeddings", 32_768),
            sliding_window=None if window is None else reader.size("sliding_window", self.sliding_window),
            hf_model_type=self.model_type,
            **_read_rotary(reader),
        )

    def write_config(self, architecture: ModelArchitecture) -> dict[str, Any]:
        scaling = _rotary_scaling(architecture)
        return {
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
            **({"rope_scaling": scaling} if scaling else {}),
            "rope_parameters": {"rope_theta": architecture.rope_theta, "rope_type": "default", **scaling},
            "tie_word_embeddings": architecture.tie_word_embeddings,
            "attention_dropout": 0.0,
            "sliding_window": architecture.sliding_window,
            **{key: False for key in self.unsupported},
        }

    def rules(self, architecture: ModelArchitecture) -> list[Rule]:
        rules: list[Rule] = [Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))]
        for layer in range(architecture.num_layers):
            mcore, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
            rules.append(Rename(f"{mcore}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",)))
            rules += self.attention_rules(architecture, f"{mcore}.self_attention", f"{hf}.self_attn")
            rules.append(Rename(f"{mcore}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",)))
            rules += self.mlp_rules(f"{mcore}.mlp", f"{hf}.mlp")
        rules.append(Rename("decoder.final_layernorm.weight", ("model.norm.weight",)))
        if not architecture.tie_word_embeddings:
            rules.append(Vocabulary("output_layer.weight", ("lm_head.weight",)))
        return rules

    def attention_rules(self, architecture: ModelArchitecture, mcore: str, hf: str) -> list[Rule]:
        """Return the rules of one layer's attention, whose tensors' names begin with ``mcore`` and ``hf``."""
        qkv = [f"{hf}.{part}_proj" for part in ("q", "k", "v")]
        rules: list[Rule] = [MergeQKV(f"{mcore}.linear_qkv.weight", tuple(f"{name}.weight" for name in qkv))]
        if architecture.add_qkv_bias:
            rules.append(MergeQKV(f"{mcore}.linear_qkv.bias", tuple(f"{name}.bias" for name in qkv)))
        if architecture.qk_layernorm:
            rules += [Rename(f"{mcore}.{part}_layernorm.weight", (f"{hf}.{part}_norm.weight",)) for part in ("q", "k")]
        return [*rules, Rename(f"{mcore}.linear_proj.weight", (f"{hf}.o_proj.weight",))]

    def mlp_rules(self, mcore: str, hf: str) -> list[Rule]:
        """Return the rules of one layer's MLP, whose tensors' names begin with ``mcore`` and ``hf``."""
        return [
            MergeGateUp(f"{mcore}.linear_fc1.weight", (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")),
            Rename(f"{mcore}.linear_fc2.weight", (f"{hf}.down_proj.weight",)),
        ]


def _read_rotary(reader: ConfigReader) -> dict[str, Any]:
    """The architecture's rotary fields."""
    config, where = reader.config, reader.where
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{where}: rope_parameters or rope_scaling must be an object, not {rope!r}")
    inner = ConfigReader(rope, f"{where}: rotary settings")
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


def _rotary_scaling(architecture: ModelArchitecture) -> dict[str, Any]:
    """``rope_scaling`` of config.json; empty without scaling."""
    if architecture.rope_scaling_factor == 1.0:
        return {}
    return {
        "rope_type": "llama3",
        "factor": architecture.rope_scaling_factor,
        "low_freq_factor": architecture.rope_low_freq_factor,
        "high_freq_factor": architecture.rope_high_freq_factor,
        "original_max_position_embeddings": architecture.rope_original_positions,
    }
