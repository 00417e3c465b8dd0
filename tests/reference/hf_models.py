"""Random models of every family, made by transformers itself, of odd sizes, for the tests of conversion."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_kd.data.tokenization import train_byte_level_bpe

TEXTS = [f"line {i}: {chr(97 + i % 26) * (i % 7 + 1)} and {i * i} more words of text" for i in range(300)]
VOCABULARY = 333  # no multiple of 128 · TP, and more than the tokenizer's 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # 3 heads a group
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILY_CASES: dict[str, dict[str, Any]] = {
    "Qwen1.5 untied": {"model_type": "qwen2", "tie_word_embeddings": False, "num_key_value_heads": 6},
    "Qwen2.5 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen3 tied, wide heads": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 20},
    "Qwen3 untied": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 8},
    "Llama 2": {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 6},
    "Llama 3.1": {"model_type": "llama", "tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE},
    "Llama 3.2 tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "Mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None, "head_dim": 8},
    "Mistral, window": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 64, "head_dim": 8},
}


def make_hf_folder(folder: Path, case: str, dtype: torch.dtype = torch.float32, shard_size: str = "100KB") -> Path:
    """A folder with several safetensors files and a tokenizer; norms and biases are random too."""
    train_byte_level_bpe(TEXTS, 300, folder)
    settings = dict(FAMILY_CASES[case])
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # they start at 0 or 1, where a wrong place would not show
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder
