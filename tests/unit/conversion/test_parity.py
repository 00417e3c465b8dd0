"""The comparison with transformers: whose tensors it reads, and what it allows for fp32's rounding."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kd.checkpoints.hf_folder import HFFolder
from megatron_kd.conversion.parity import LOGIT_TOLERANCE, compare_logits, transformers_model
from megatron_kd.errors import CheckpointError
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.hf_models import make_hf_folder
from tests.reference.one_rank import tiny_model


@pytest.fixture
def folder(tmp_path):
    """One folder with one file."""
    return make_hf_folder(tmp_path / "hf", "Llama 3.2 tied", shard_size="5GB")


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_weights_are_those_of_the_file(folder):
    state, stored = transformers_model(folder).state_dict(), load_file(folder / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert torch.equal(state["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_a_tensor_too_few_and_one_too_many_are_named(folder):
    change(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"misses \['model.norm.weight'\] and does not know \[\]"):
        transformers_model(folder)
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48), "extra": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"misses \[\] and does not know \['extra'\]"):
        transformers_model(folder)


def test_large_logits_may_differ_by_what_fp32_rounds_and_no_more(folder):
    """A deep model's logits of 20 differ by 1e-3 between any two programs; a weight wrong by 0.1% does not pass."""
    change(folder, lambda tensors: tensors["model.norm.weight"].mul_(500))
    with distributed_runtime():
        source = HFFolder(folder)
        model = tiny_model(source.architecture)
        source.load_into([model])
        assert compare_logits(model, folder, "the") > LOGIT_TOLERANCE
        with torch.no_grad():
            model.decoder.final_layernorm.weight.mul_(1.001)
        with pytest.raises(CheckpointError, match="the logits differ"):
            compare_logits(model, folder, "the")
