"""Checkpoints as Megatron-LM writes them, with Megatron-Core's own writer: loaded, exported, refused."""

import argparse
import json
import signal

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.transformer.enums import AttnBackend

from megatron_kd.checkpoints.sharded_state import sharded_weights
from megatron_kd.checkpoints.weights import load_whole_model, open_checkpoint
from megatron_kd.conversion.conversion_config import ConvertToHFConfig
from megatron_kd.conversion.convert_to_hf import run as export
from megatron_kd.data.tokenization import train_byte_level_bpe
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import full_logits
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.hf_models import TEXTS
from tests.reference.one_rank import tiny_model

ARCHITECTURE = ModelArchitecture(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=44,
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=300,
    tie_word_embeddings=False,
    rope_theta=5000.0,
)


def arguments(architecture=ARCHITECTURE, **changes):
    """The arguments that Megatron-LM stores, and some of what it stores beside them."""
    values = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.head_dim,
        "padded_vocab_size": 384,
        "untie_embeddings_and_output_weights": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "qk_layernorm": False,
        "rotary_base": 5000,
        "rotary_percent": 1.0,
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "num_experts": None,
        "max_position_embeddings": 64,
        "seq_length": 32,
        "bf16": False,
        "params_dtype": torch.float32,
        "exit_signal": signal.SIGTERM,
        "attention_backend": AttnBackend.auto,
        "tokenizer_model": "/nowhere",
    }
    return argparse.Namespace(**{**values, **changes})


@pytest.fixture
def stock(tmp_path):
    """A save folder with ``iter_0000010``, extra state as Transformer Engine has it, and the model that was saved."""
    folder = tmp_path / "saved" / "iter_0000010"
    folder.mkdir(parents=True)
    with distributed_runtime():
        model = tiny_model(ARCHITECTURE)
        write(folder, model, arguments())
        yield folder, model
    assert not list(tmp_path.glob("*.tmp-*"))


def write(folder, model, args):
    """The state dict of Megatron-LM's ``generate_state_dict``."""
    extra = ShardedObject("decoder.layers.self_attention.core_attention._extra_state", b"fp8", (3,), (0,), replica_id=0)
    others = [ShardedObject(extra.key, b"fp8", (3,), (layer,), replica_id=0) for layer in (1, 2)]
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 10, "extra": [extra, *others]}
    dist_checkpointing.save({**state, "model": sharded_weights(model, model.pg_collection)}, str(folder))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("10")
    train_byte_level_bpe(TEXTS, 300, folder / "tokenizer")


def test_it_loads_and_exports(stock, tmp_path):
    folder, model = stock
    tokens = torch.randint(0, 300, (2, 9))
    expected = full_logits(model, tokens)
    for path in (folder, folder.parent):
        loaded, info = load_whole_model(path)
        assert info.architecture.parameters == ARCHITECTURE.parameters and info.path == folder
        assert torch.equal(full_logits(loaded, tokens), expected)
    exported = export(ConvertToHFConfig(input=str(folder.parent), output=str(tmp_path / "hf")))  # compares logits
    assert json.loads((exported / "config.json").read_text())["model_type"] == "qwen2"
    assert "converted from megatron lm checkpoint" in (exported / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 8}, "num_experts=8 are not supported"),
        ({"normalization": "LayerNorm", "swiglu": False}, "swiglu=False, normalization='LayerNorm'"),
        ({"window_size": (128, 0)}, r"window_size=\(128, 0\) are not supported"),
        ({"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor=4 are not"),
        ({"num_layers": 4}, "lacks|has shape"),
        ({"hidden_size": None}, "argument 'hidden_size' is missing"),
        ({"untie_embeddings_and_output_weights": True, "qk_layernorm": True}, "lacks decoder.layers.self_att"),
    ],
)
def test_another_architecture_is_refused(stock, tmp_path, change, message):
    folder, model = stock
    other = tmp_path / "other"
    other.mkdir()
    write(other, model, arguments(**change))
    with pytest.raises(CheckpointError, match=message):
        load_whole_model(other)


def test_arguments_that_could_run_code_are_refused(stock, tmp_path):
    folder, model = stock
    other = tmp_path / "other"
    other.mkdir()
    write(other, model, arguments(hook=print))
    with pytest.raises(CheckpointError, match="holds a '.*print', which is not loaded: it could run code"):
        open_checkpoint(other)


def test_without_a_tokenizer_it_says_where_to_put_it(stock):
    folder, _ = stock
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="does not hold its tokenizer: put tokenizer.json and"):
        open_checkpoint(folder)


def test_damage_is_an_error_that_names_the_checkpoint(stock):
    folder, _ = stock
    for file in sorted(folder.glob("*.distcp")):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="iter_0000010"):
        load_whole_model(folder)
    (folder / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=".metadata cannot be read"):
        open_checkpoint(folder)
