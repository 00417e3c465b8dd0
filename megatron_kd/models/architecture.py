"""Model architectures, apart from how they are sharded, and the ``model.*`` keys that choose one. Imports no torch.

``ARCHITECTURES`` lists the sizes by name: the MiniPLM paper's (``qwen_104m`` … ``qwen_1.8b``) and toy sizes for a CPU,
whose vocabulary is the dataset's tokenizer's. All but two toys are Qwen2-type decoders (Hugging Face
``Qwen2ForCausalLM``): RoPE, RMSNorm, SwiGLU, bias on Q, K and V only. Models of other sizes and families come from
Hugging Face folders (``model.name`` ``as_init_from``). Evidence for the sizes: MiniPLM (arXiv 2410.17215), table of
model configurations, and the released checkpoints.
"""

from dataclasses import dataclass, replace
from typing import Iterator, Literal

from megatron_kd.errors import ConfigError

QWEN_VOCAB_SIZE = 151_936
AS_INIT_FROM = "as_init_from"
LayerSpecName = Literal["auto", "te", "local"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ModelArchitecture:
    """A decoder with RoPE, RMSNorm and SwiGLU; the defaults are Qwen2's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int = 0
    """Rows of the embedding, without padding for tensor parallelism; 0 means as many as the dataset's tokenizer has."""
    kv_channels: int = 0
    """Width of one head; 0 means hidden_size / num_attention_heads."""
    tie_word_embeddings: bool = True
    add_qkv_bias: bool = True
    qk_layernorm: bool = False
    rope_theta: float = 1_000_000.0
    rope_scaling_factor: float = 1.0
    """How far Llama 3.1 stretches low frequencies; 1 means not at all, and the next three have no effect."""
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_positions: int = 8192
    sliding_window: int | None = None
    """How many tokens attention reaches back; longer sequences are refused."""
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    max_position_embeddings: int = 32_768
    hf_model_type: str = "qwen2"
    """The family that the model is exported as, one of ``checkpoints/families.py``."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters of the layers and the final norm: the N of compute-optimal scaling."""
        h, f = self.hidden_size, self.ffn_hidden_size
        q_width, kv_width = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = h * (q_width + 2 * kv_width) + q_width * h
        bias = (q_width + 2 * kv_width) if self.add_qkv_bias else 0
        qk_norms = 2 * self.head_dim if self.qk_layernorm else 0
        return self.num_layers * (attention + bias + qk_norms + 3 * h * f + 2 * h) + h

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding and, where it is not tied, the output layer."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All parameters, tied weights once."""
        return self.non_embedding_parameters + self.embedding_parameters

    def with_vocab_size(self, vocab_size: int) -> "ModelArchitecture":
        """Return the architecture with its vocabulary filled in where it was left to the tokenizer."""
        return self if self.vocab_size else replace(self, vocab_size=vocab_size)


def _qwen(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool = True) -> ModelArchitecture:
    return ModelArchitecture(layers, hidden, ffn, heads, heads, vocab_size=QWEN_VOCAB_SIZE, tie_word_embeddings=tied)


_TOY = ModelArchitecture(4, 64, 176, 4, 4, rope_theta=10_000.0, init_std=0.08)
"""For a CPU, sized for the quickstart's minutes: narrow layers need a wide init_std."""

ARCHITECTURES: dict[str, ModelArchitecture] = {
    # The paper's sizes. No published count of 300M says whether it is tied (247M) or not (363M): tied, as its siblings.
    "qwen_104m": _qwen(8, 512, 1408, 8),
    "qwen_200m": _qwen(12, 768, 2112, 12),
    "qwen_300m": _qwen(18, 768, 2112, 12),
    "qwen_500m": _qwen(24, 1024, 2816, 16),
    "qwen_1.2b": _qwen(24, 1536, 4224, 16, tied=False),
    "qwen_1.8b": _qwen(24, 2048, 5504, 16, tied=False),
    "qwen_toy_reference": replace(_TOY, num_layers=2),
    "qwen_toy_student": _TOY,
    "qwen_toy_teacher": replace(_TOY, hidden_size=96, ffn_hidden_size=256),
    "qwen_toy_untied": replace(
        _TOY, hidden_size=96, ffn_hidden_size=256, num_query_groups=2, tie_word_embeddings=False, init_std=0.02
    ),
    "qwen3_toy": replace(
        _TOY, num_query_groups=2, kv_channels=32, add_qkv_bias=False, qk_layernorm=True, hf_model_type="qwen3"
    ),
    "llama_toy": replace(
        _TOY,
        num_query_groups=2,
        add_qkv_bias=False,
        tie_word_embeddings=False,
        rope_scaling_factor=8.0,
        rope_original_positions=16,
        hf_model_type="llama",
    ),
    "qwen_21m": replace(_qwen(6, 256, 704, 4, tied=False), vocab_size=32_000),
}


def architecture_by_name(name: str) -> ModelArchitecture:
    """Return the architecture called ``name``.

    Raises:
        ConfigError: the name is unknown; the message lists those that are known.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"model.name '{name}' is unknown; choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


@dataclass(frozen=True)
class ModelConfig:
    """The ``model.*`` keys of training."""

    name: str
    """One of ``ARCHITECTURES``, or ``as_init_from``: the architecture of ``init_from``."""
    init_from: str | None = None
    layer_spec: LayerSpecName = "auto"

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.name == AS_INIT_FROM:
            if self.init_from is None:
                yield f"'model.name' is {AS_INIT_FROM}, so 'model.init_from' (a checkpoint or folder) is required"
        elif self.name not in ARCHITECTURES:
            yield f"'model.name' is '{self.name}', not one of {', '.join(ARCHITECTURES)}, {AS_INIT_FROM}"


@dataclass(frozen=True)
class ScoredModelConfig:
    """The ``model.*`` keys of scoring and evaluation."""

    path: str
    """A checkpoint, a run folder or a Hugging Face folder."""
    layer_spec: LayerSpecName = "auto"
    precision: Precision | None = None
    """None means the precision that the model was trained in."""
