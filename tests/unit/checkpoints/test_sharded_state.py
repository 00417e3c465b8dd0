"""Sharded states of both layer specs have the same keys; a checkpoint's tensors are read one by one."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megatron_kd.checkpoints.checkpoint_writer import CheckpointWriter
from megatron_kd.checkpoints.sharded_state import (
    StoredTensors,
    meta_state,
    meta_tensors,
    sharded_weights,
    stream_tensors,
)
from megatron_kd.checkpoints.weights import load_sharded_state
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.models.gpt import build_model
from megatron_kd.models.layer_specs import has_transformer_engine
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, one_rank_groups, tiny_model

RECORD = json.loads((Path(__file__).parents[2] / "golden" / "transformer_engine_sharded_keys.json").read_text())
CASES = {
    "qwen_toy_student": ["bias on Q, K, V"],
    "qwen_toy_untied": ["bias on Q, K, V", "untied"],
    "qwen3_toy": ["norms on Q, K"],
    "llama_toy": ["untied"],
}


def keys_of(name, spec, device):
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    architecture = architecture_by_name(name).with_vocab_size(300)
    [model] = build_model(
        architecture, layout, one_rank_groups(), precision="fp32", device=device, layer_spec=spec, max_sequence_length=8
    )
    entries = sharded_weights(model, model.pg_collection).values()
    tensors = {entry.key for entry in entries if isinstance(entry, (ShardedTensor, ShardedTensorFactory))}
    return tensors, {entry.key for entry in entries if isinstance(entry, ShardedObject)}


@pytest.mark.parametrize("name", CASES)
def test_our_spec_has_the_recorded_keys(name):
    with distributed_runtime() as runtime:
        tensors, objects = keys_of(name, "local", runtime.device)
    expected = RECORD["tensors"]["every model"] + [key for part in CASES[name] for key in RECORD["tensors"][part]]
    assert sorted(tensors) == sorted(expected)
    assert objects <= set(RECORD["extra_state"])


@pytest.mark.gpu
@pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine on a GPU")
@pytest.mark.parametrize("name", CASES)
def test_the_record_is_what_transformer_engine_gives(name):
    with distributed_runtime() as runtime:
        tensors, objects = keys_of(name, "te", runtime.device)
        assert tensors == keys_of(name, "local", runtime.device)[0]
    assert objects <= set(RECORD["extra_state"])


def test_extra_state_that_a_checkpoint_lacks_is_not_asked_for(tmp_path):
    """Transformer Engine's attention asks for it of a checkpoint that the local spec wrote, and the reverse."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with distributed_runtime():
        model = tiny_model()
        state = sharded_weights(model, model.pg_collection)
        mine = [name for name in state if name.endswith("_extra_state")]
        dist_checkpointing.save({"model0": {n: e for n, e in state.items() if n not in mine}}, str(folder))
        key = "decoder.layers.self_attention.core_attention._extra_state"
        asked = sharded_weights(model, model.pg_collection)
        asked |= {f"{key}.{i}": ShardedObject(key, None, (2,), (i,), replica_id=0) for i in range(2)}
        loaded = load_sharded_state({"model0": asked}, folder)["model0"]
        assert not any("_extra_state" in name for name in loaded)
        assert torch.equal(loaded["decoder.final_layernorm.weight"], model.decoder.final_layernorm.weight)


UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False, vocab_size=300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of weights alone, and the weights."""
    folder = tmp_path_factory.mktemp("saved")
    with distributed_runtime():
        model = tiny_model(UNTIED)
        writer = CheckpointWriter(folder)
        writer.begin(0, sharded_weights(model, model.pg_collection), lambda *_: None)
        writer.finish()
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return folder / "step_0", weights


def test_every_tensor_comes_once_in_the_models_order(saved):
    path, weights = saved
    with distributed_runtime():
        found = list(stream_tensors(path, UNTIED, "fp32"))
        shapes = meta_tensors(meta_state(UNTIED, "fp32"))
    assert [name for name, _ in found] == list(shapes) and {name for name, _ in found} == weights.keys()
    for name, tensor in found:
        assert torch.equal(tensor, weights[name]), name


def test_a_model_with_more_padding_gets_zeros_there(saved):
    path, weights = saved
    with distributed_runtime():
        wider = meta_state(dataclasses.replace(UNTIED, vocab_size=500), "fp32")  # 512 rows where 384 are stored
        read = StoredTensors(path).read(wider["output_layer.weight"])
    assert read.shape[0] == 512 and torch.equal(read[:384], weights["output_layer.weight"])
    assert read[384:].abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_layers": 3}, "lacks|has shape"),
        ({"ffn_hidden_size": 56}, "has shape"),
        ({"qk_layernorm": True}, "lacks decoder.layers.self_attention.k_layernorm.weight, .*q_layernorm.weight$"),
    ],
)
def test_another_architecture_is_an_error_that_names_what_differs(saved, change, match):
    with distributed_runtime(), pytest.raises(CheckpointError, match=match):
        list(stream_tensors(saved[0], dataclasses.replace(UNTIED, **change), "fp32"))


def test_damaged_data_and_metadata_are_errors_of_one_line(saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "copy")
    [file] = copy.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    with distributed_runtime(), pytest.raises(CheckpointError, match="cannot be read") as failed:
        list(stream_tensors(copy, UNTIED, "fp32"))
    assert str(copy) in str(failed.value) and "\n" not in str(failed.value)
    (copy / ".metadata").write_bytes(b"nothing")
    with distributed_runtime(), pytest.raises(CheckpointError, match=".metadata cannot be read"):
        StoredTensors(copy)


def test_reading_stops_where_the_reader_stops(saved):
    with distributed_runtime():
        first = list(itertools.islice(stream_tensors(saved[0], UNTIED, "fp32"), 1))
    assert [name for name, _ in first] == ["embedding.word_embeddings.weight"]
