"""One tensor at a time out of a checkpoint: every bit, padding of other layouts, what is missing or damaged."""

import dataclasses
import itertools
import shutil

import pytest
import torch

from megatron_kd.checkpoints.checkpoint_writer import CheckpointWriter
from megatron_kd.checkpoints.sharded_state import StoredTensors, meta_state, sharded_weights, stream_tensors, tensors_of
from megatron_kd.errors import CheckpointError
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model

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
        shapes = tensors_of(meta_state(UNTIED, "fp32"))
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
