"""Qwen2 against transformers' own model: exact round trips, and config.json both ways."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_kd.conversion.qwen2 import architecture_from_hf, hf_config, qwen2_rules, uses_fused_norms
from megatron_kd.conversion.rules import hf_to_mcore, mcore_to_hf
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture

PADDED = 256


def odd_architecture(tied: bool, groups: int) -> ModelArchitecture:
    """Three heads a group where groups = 2, a vocabulary that no power of two divides."""
    return ModelArchitecture(
        num_layers=3, hidden_size=48, ffn_hidden_size=44, num_attention_heads=6, num_query_groups=groups,
        vocab_size=157, tie_word_embeddings=tied, rope_theta=12_345.0,
    )


def transformers_model(architecture: ModelArchitecture) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**hf_config(architecture, "float32", 3)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("fused_norms", [False, True])
def test_round_trip_is_exact(tied: bool, groups: int, fused_norms: bool) -> None:
    architecture = odd_architecture(tied, groups)
    state = transformers_model(architecture).state_dict()
    rules = qwen2_rules(architecture, fused_norms)
    mcore = dict(hf_to_mcore(rules, architecture, state, PADDED))
    assert uses_fused_norms(mcore) is fused_norms
    assert mcore["embedding.word_embeddings.weight"].shape == (PADDED, 48)
    assert ("output_layer.weight" in mcore) is not tied
    again = dict(mcore_to_hf(rules, architecture, mcore))
    assert set(again) == set(state) - ({"lm_head.weight"} if tied else set())
    for name, tensor in again.items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_transformers(tied: bool) -> None:
    architecture = odd_architecture(tied, 2)
    assert sum(p.numel() for p in transformers_model(architecture).parameters()) == architecture.parameters


@pytest.mark.parametrize("convention", ["both", "rope_theta", "rope_parameters", "written by transformers"])
def test_config_json_both_ways(convention: str, tmp_path: Path) -> None:
    architecture = odd_architecture(True, 2)
    config = hf_config(architecture, "float32", 3)
    if convention == "written by transformers":
        Qwen2Config(**config).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
    elif convention != "both":
        del config[{"rope_theta": "rope_parameters", "rope_parameters": "rope_theta"}[convention]]
    again = architecture_from_hf(config, "config.json")
    assert again.head_dim == architecture.head_dim
    for field in ("num_query_groups", "vocab_size", "tie_word_embeddings", "rope_theta", "norm_epsilon", "parameters"):
        assert getattr(again, field) == getattr(architecture, field), field


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "scaled rotary"),
    ],
)
def test_refuses_by_name(change: dict, message: str) -> None:
    config = {**hf_config(odd_architecture(True, 2), "float32", 3), **change}
    with pytest.raises(CheckpointError, match=message):
        architecture_from_hf(config, "config.json")


def test_missing_key_is_named() -> None:
    config = hf_config(odd_architecture(True, 2), "float32", 3)
    del config["hidden_size"]
    with pytest.raises(CheckpointError, match="here/config.json: key 'hidden_size' is missing"):
        architecture_from_hf(config, "here/config.json")
