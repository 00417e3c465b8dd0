"""Files written tensor by tensor are the library's own; tensors out of plan are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_kd.checkpoints.safetensors_file import SafetensorsWriter, TensorSpec, plan_files

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 2, 2).half(),
    "empty": torch.zeros(0, 4),
    "d": torch.randn(10).double()[::2],
}
SPECS = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("limit", [1, 64, 10**9])
def test_the_library_reads_what_was_written(limit, tmp_path):
    with SafetensorsWriter(tmp_path, SPECS, limit) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    found = {
        name: (file.name, held) for file in tmp_path.glob("*.safetensors") for name, held in load_file(file).items()
    }
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name][1].dtype == tensor.dtype and torch.equal(found[name][1], tensor), name
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() is (limit < 10**9)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_only_a_single_tensor_makes_a_file_larger_than_the_limit():
    specs = {name: TensorSpec((size,), torch.float32) for name, size in {"w": 10, "x": 10, "y": 100, "z": 1}.items()}
    assert list(plan_files(specs, 80).values()) == [["w", "x"], ["y"], ["z"]]
    assert list(plan_files(specs, 10**6)) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("added", "match"),
    [
        (["b"], "'b' .* was given where 'a' .* was planned"),
        (["a", "a"], "'a' .* was given where 'b'"),
        (["a", "b"], "planned tensors were never given: c, empty, d"),
        ([*TENSORS, "a"], "was given where nothing was planned"),
    ],
)
def test_another_order_or_number_than_planned_is_refused(added, match, tmp_path):
    with pytest.raises(ValueError, match=match), SafetensorsWriter(tmp_path, SPECS, 64) as writer:
        for name in added:
            writer.add(name, TENSORS[name])


@pytest.mark.parametrize("other", [torch.randn(5, 3), torch.randn(3, 5).bfloat16()])
def test_another_shape_or_dtype_than_planned_is_refused(other, tmp_path):
    with pytest.raises(ValueError, match="'a' .* was given where 'a' .* was planned"):
        with SafetensorsWriter(tmp_path, SPECS, 64) as writer:
            writer.add("a", other)
