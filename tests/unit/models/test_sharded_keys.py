"""A checkpoint of one layer spec loads under the other: the same keys, and extra state that only one of them has."""

import json
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megatron_kd.checkpoints.sharded_state import sharded_weights
from megatron_kd.checkpoints.weights import load_sharded_state
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.models.gpt import build_model
from megatron_kd.models.layer_specs import has_transformer_engine
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import one_rank_groups, tiny_model

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
    """As Transformer Engine's attention asks for it of a checkpoint that the local spec wrote; and the other way."""
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
