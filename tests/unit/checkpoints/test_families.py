"""Tables against transformers' own models: exact round trips, config.json both ways, nonsense in config.json."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, Qwen2Config, Qwen2ForCausalLM

from megatron_kd.checkpoints.families import FAMILIES, architecture_from_hf, exportable_as, hf_config, tensor_table
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture

PADDED = 256


def odd_architecture(tied: bool, groups: int) -> ModelArchitecture:
    """Three heads a group where groups = 2, a vocabulary that no power of two divides."""
    return ModelArchitecture(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=44,
        num_attention_heads=6,
        num_query_groups=groups,
        vocab_size=157,
        tie_word_embeddings=tied,
        rope_theta=12_345.0,
    )


def transformers_model(architecture: ModelArchitecture) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**hf_config(architecture, "float32", 3)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_round_trip_is_exact(tied: bool, groups: int) -> None:
    architecture = odd_architecture(tied, groups)
    state = transformers_model(architecture).state_dict()
    table = tensor_table(architecture, "the folder")
    mcore = {name: table.to_mcore(name, state.__getitem__, PADDED) for name in table.mcore_names}
    assert mcore["embedding.word_embeddings.weight"].shape == (PADDED, 48)
    assert ("output_layer.weight" in mcore) is not tied
    again = dict(part for name, tensor in mcore.items() for part in table.to_hf(name, tensor))
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
        ({"model_type": "mamba"}, "model_type is 'mamba', where these are supported: qwen2"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "type 'yarn' are not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rotary settings: key 'factor' is missing"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"num_key_value_heads": 4}, "6 num_attention_heads do not divide by 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 4096"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True is not supported"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True is not supported"),
    ],
)
def test_refuses_by_name(change: dict, message: str) -> None:
    config = {**hf_config(odd_architecture(True, 2), "float32", 3), **change}
    with pytest.raises(CheckpointError, match=message):
        architecture_from_hf(config, "config.json")


def test_a_window_that_config_json_leaves_out_is_transformers_default() -> None:
    config = MistralConfig().to_dict()
    given = architecture_from_hf({**config, "sliding_window": None}, "config.json")
    del config["sliding_window"]
    left_out = architecture_from_hf(config, "config.json")
    assert (given.sliding_window, left_out.sliding_window) == (None, MistralConfig().sliding_window)


NONSENSE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.dictionaries(st.sampled_from(sorted(hf_config(odd_architecture(True, 2), "float32", 3))), NONSENSE),
    removed=st.sets(st.sampled_from(sorted(hf_config(odd_architecture(True, 2), "float32", 3))), max_size=3),
)
def test_nonsense_gives_an_architecture_or_one_clear_error(changes: dict, removed: set) -> None:
    config = {**hf_config(odd_architecture(True, 2), "float32", 3), **changes}
    config = {key: value for key, value in config.items() if key not in removed}
    try:
        architecture = architecture_from_hf(config, "here/config.json")
    except CheckpointError as error:
        assert str(error).startswith("here/config.json: ") and "\n" not in str(error)
    else:
        assert architecture.parameters > 0 and architecture.head_dim % 2 == 0


def test_families_that_cannot_hold_a_model_refuse_it() -> None:
    architecture = odd_architecture(True, 2)
    for change, message in [
        ({"add_qkv_bias": False}, "Qwen2ForCausalLM cannot express this model: it has add_qkv_bias=False"),
        ({"hf_model_type": "llama"}, "LlamaForCausalLM cannot express this model: it has add_qkv_bias=True"),
        ({"sliding_window": 64}, "sliding_window=64"),
        ({"hf_model_type": "bloom"}, "'bloom' is not a known family"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            hf_config(dataclasses.replace(architecture, **change), "float32", 3)


def test_missing_key_is_named() -> None:
    config = hf_config(odd_architecture(True, 2), "float32", 3)
    del config["hidden_size"]
    with pytest.raises(CheckpointError, match="here/config.json: key 'hidden_size' is missing"):
        architecture_from_hf(config, "here/config.json")


def test_every_family_reads_what_it_writes() -> None:
    for name, family in FAMILIES.items():
        variant = dataclasses.replace(
            odd_architecture(True, 2), kv_channels=8, hf_model_type=name,
            add_qkv_bias=family.add_qkv_bias, qk_layernorm=family.qk_layernorm,
        )  # fmt: skip
        assert family.model_type == name and exportable_as(variant) is not None
        assert architecture_from_hf(hf_config(variant, "float32", 3), "config.json") == variant
