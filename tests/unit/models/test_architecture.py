"""Parameter counts of the paper's sizes (MiniPLM, arXiv 2410.17215, and the released checkpoints); ``model.*`` keys."""

import subprocess
import sys

import pytest
import torch

from megatron_kd.config import load_config
from megatron_kd.errors import ConfigError
from megatron_kd.models.architecture import ARCHITECTURES, ModelArchitecture, ModelConfig, architecture_by_name
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model

COUNTS = {  # name: (without embeddings, all, tied or untied as released)
    "qwen_104m": (25_711_104, 103_502_336),
    "qwen_200m": (86_750_976, 203_437_824),
    "qwen_300m": (130_126_080, 246_812_928),
    "qwen_500m": (308_405_248, 463_987_712),
    "qwen_1.2b": (693_818_880, 1_160_566_272),
    "qwen_1.8b": (1_214_498_816, 1_836_828_672),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_papers_sizes(name):
    architecture = architecture_by_name(name)
    assert (architecture.non_embedding_parameters, architecture.parameters) == COUNTS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_multi_head_counts_follow_the_closed_form(name):
    a = architecture_by_name(name).with_vocab_size(1000)
    d, f, layers = a.hidden_size, a.ffn_hidden_size, a.num_layers
    if a.num_query_groups == a.num_attention_heads:
        assert a.non_embedding_parameters == layers * (4 * d * d + 3 * d + 3 * d * f + 2 * d) + d
    assert a.embedding_parameters == a.vocab_size * d * (1 if a.tie_word_embeddings else 2)
    assert a.head_dim * a.num_attention_heads == d or a.kv_channels


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_query_groups": 4},
        {"kv_channels": 16},
        {"qk_layernorm": True},
        {"add_qkv_bias": False},
    ],
)
def test_the_count_is_that_of_the_built_model(change):
    architecture = ModelArchitecture(**{**vars(TINY), "vocab_size": 256, **change})
    with distributed_runtime():
        model = tiny_model(architecture)
        assert sum(parameter.numel() for parameter in model.parameters()) == architecture.parameters
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_vocabulary_is_the_tokenizers_only_where_it_was_left_open():
    assert architecture_by_name("qwen_toy_student").with_vocab_size(77).vocab_size == 77
    assert architecture_by_name("qwen_104m").with_vocab_size(77).vocab_size == 151_936


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'qwen_7b' is unknown; choose one of qwen_104m"):
        architecture_by_name("qwen_7b")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "'name' is required"),
        (["name=qwen_7b"], "'model.name' is 'qwen_7b', not one of qwen_104m, .*, as_init_from"),
        (["name=as_init_from"], "so 'model.init_from' .* is required"),
    ],
)
def test_the_keys_name_an_architecture(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ModelConfig, None, keys)
    load_config(ModelConfig, None, ["name=as_init_from", "init_from=folder"])


def test_keys_are_read_without_torch():
    modules = "megatron_kd.models.architecture, megatron_kd.parallel.layout"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
