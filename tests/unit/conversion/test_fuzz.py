"""Random damage to the headers, indices and manifests that readers meet: one clear error or nothing, never a crash."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_kd.checkpoints.hf_folder import HFFolder
from megatron_kd.checkpoints.weights import load_whole_model, open_checkpoint
from megatron_kd.errors import CheckpointError
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.hf_models import make_hf_folder
from tests.unit.conversion.test_convert_from_hf import import_folder

CALM = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A folder whose files the tests damage and restore."""
    return make_hf_folder(tmp_path_factory.mktemp("hf") / "model", "Llama 3.2 tied")


@pytest.fixture(scope="module")
def checkpoint(hf, tmp_path_factory):
    """Its checkpoint."""
    return import_folder(hf, tmp_path_factory.mktemp("checkpoint") / "checkpoint", verify=False)


def read_all(path):
    folder = HFFolder(path)
    for name in folder.table.mcore_names:
        folder.mcore_tensor(name, 384)


def damaged(data, start, length, new):
    return data[: start % len(data)] + new + data[start % len(data) + length :]


@CALM
@given(start=st.integers(0, 3000), length=st.integers(0, 40), new=st.binary(max_size=40))
def test_safetensors_headers(hf, tmp_path_factory, start, length, new):
    path = sorted(hf.glob("model-*.safetensors"))[0]
    kept = path.read_bytes()
    path.write_bytes(damaged(kept, start, length, new))
    try:
        read_all(hf)
    except CheckpointError as error:
        assert str(hf) in str(error) and "\n" not in str(error).strip()
    finally:
        path.write_bytes(kept)


@CALM
@given(start=st.integers(0, 5000), length=st.integers(0, 40), new=st.binary(max_size=20))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_files_of_a_folder(hf, name, start, length, new):
    kept = (hf / name).read_bytes()
    (hf / name).write_bytes(damaged(kept, start, length, new))
    try:
        read_all(hf)
    except CheckpointError as error:
        assert str(hf) in str(error)
    finally:
        (hf / name).write_bytes(kept)


@CALM
@given(
    weight_map=st.one_of(
        st.none(), st.integers(), st.lists(st.text(max_size=3), max_size=2),
        st.dictionaries(
            st.sampled_from(["model.norm.weight", "x"]),
            st.one_of(st.none(), st.integers(), st.text(max_size=8), st.sampled_from(["../up.safetensors", "/etc/x"])),
            min_size=1,
        ),
    )
)  # fmt: skip
def test_index_contents(hf, weight_map):
    kept = (hf / "model.safetensors.index.json").read_bytes()
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    try:
        with pytest.raises(CheckpointError):
            HFFolder(hf)
    finally:
        (hf / "model.safetensors.index.json").write_bytes(kept)


@CALM
@given(
    name=st.sampled_from(["manifest.json", "checksums.json", ".metadata", "metadata.json", "__0_0.distcp"]),
    start=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_of_a_checkpoint(checkpoint, name, start, bit):
    path = checkpoint / name
    kept = path.read_bytes()
    data = bytearray(kept)
    data[start % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data))
    try:
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            open_checkpoint(checkpoint).verify()
    finally:
        path.write_bytes(kept)


def test_the_undamaged_ones_are_read(hf, checkpoint, tmp_path):
    read_all(hf)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    open_checkpoint(copy).verify()
    with distributed_runtime():
        model, _ = load_whole_model(copy)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
