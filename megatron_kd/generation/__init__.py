"""Text from any of our models on its own layout: KV-cached decoding, sampling with per-sequence seeds."""

from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import Generated, MixedPolicy, ModelPolicy, generate
from megatron_kd.generation.sampling import SamplingConfig

__all__ = ["Decoder", "Generated", "MixedPolicy", "ModelPolicy", "SamplingConfig", "generate"]
