"""Exported folders in transformers: logits, sharded files, what is refused; the model card."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_kd.config import load_config
from megatron_kd.conversion.conversion_config import ConvertToHFConfig, parse_size
from megatron_kd.conversion.convert_to_hf import model_card, run, write_hf_folder
from megatron_kd.conversion.parity import compare_logits
from megatron_kd.errors import CheckpointError, ConfigError, DataError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import build_model, full_logits
from megatron_kd.models.parameters import initialize_weights
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import distributed_runtime

MANIFEST = {
    "eos_id": 3,
    "seq_length": 32,
    "precision": "fp32",
    "dataset_path": "data/corpus",
    "tokenizer_hash": "abc",
    "progress": {"step": 7, "tokens": 900},
    "config": {"model": {"name": "toy"}, "distillation": {"method": "none"}},
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "config.json", "model.safetensors"):  # a model's folder: only the first is copied
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(params=[(True, 6), (False, 2), (True, 1)], ids=["tied", "untied GQA", "tied MQA"])
def model_and_architecture(request: pytest.FixtureRequest):
    tied, groups = request.param
    architecture = ModelArchitecture(3, 48, 44, 6, groups, vocab_size=157, tie_word_embeddings=tied, rope_theta=5_000.0)
    with distributed_runtime() as runtime:
        layout = ParallelLayout.for_world(ParallelConfig(), 1)
        [model] = build_model(
            architecture,
            layout,
            create_process_groups(layout),
            precision="fp32",
            device=runtime.device,
            layer_spec="local",
            max_sequence_length=32,
        )
        initialize_weights(model, 0.2, seed=1)
        with torch.no_grad():  # biases and norms start at 0 and 1, where a wrong place would not show
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        yield model.eval(), architecture


def export(folder: Path, model, architecture: ModelArchitecture, tokenizer: Path, limit: str = "5GB") -> Path:
    folder.mkdir()
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    shapes = {name: tensor.to("meta") for name, tensor in state.items()}
    write_hf_folder(folder, architecture, shapes, state.items(), MANIFEST, tokenizer, parse_size(limit))
    return folder


def logits_in_a_fresh_process(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What a user of the folder gets, with transformers alone; eos of the generation settings is checked on the way."""
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, tokens, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 3
with torch.no_grad():
    torch.save(model(input_ids=torch.load(tokens)).logits, output)
"""
    given, output = folder.parent / "tokens.pt", folder.parent / "logits.pt"
    torch.save(tokens, given)
    subprocess.run(
        [sys.executable, "-c", script, str(folder), str(given), str(output)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return torch.load(output)


def test_transformers_gives_the_same_logits(model_and_architecture, tokenizer: Path, tmp_path: Path) -> None:
    model, architecture = model_and_architecture
    folder = export(tmp_path / "hf", model, architecture, tokenizer)
    assert compare_logits(model, folder, "the exported model's") < 1e-4
    tokens = torch.randint(0, 157, (2, 9))
    logits = logits_in_a_fresh_process(folder, tokens)
    assert logits.shape == (2, 9, 157) and logits.std() > 0.1
    torch.testing.assert_close(logits, full_logits(model, tokens), rtol=0, atol=1e-4)
    assert (folder / "tokenizer.json").is_file()
    assert "written by Megatron-KD" in (folder / "README.md").read_text()


def test_sharded_files_load_the_same(model_and_architecture, tokenizer: Path, tmp_path: Path) -> None:
    model, architecture = model_and_architecture
    folder = export(tmp_path / "hf", model, architecture, tokenizer, "40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and not (folder / "model.safetensors").exists()
    assert compare_logits(model, folder, "the exported model's") < 1e-4


def test_verification_finds_a_wrong_weight(model_and_architecture, tokenizer: Path, tmp_path: Path) -> None:
    model, architecture = model_and_architecture
    folder = export(tmp_path / "hf", model, architecture, tokenizer)
    with torch.no_grad():
        # Swap two heads' rows of the last layer: what a wrong interleaving would do.
        bias = model.decoder.layers[-1].self_attention.linear_qkv.bias
        bias.copy_(bias.roll(8))
    with pytest.raises(CheckpointError, match="the exported model's logits differ"):
        compare_logits(model, folder, "the exported model's")


def test_refuses_without_a_checkpoint_and_over_an_output(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        run(ConvertToHFConfig(input=str(tmp_path / "none"), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="already exists"):
        run(ConvertToHFConfig(input=str(tmp_path / "none"), output=str(tmp_path)))


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "5TB"])
def test_refuses_a_shard_size_it_cannot_read(size: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        load_config(ConvertToHFConfig, None, ["input=a", "output=b", f"max_shard_size={size}"])


def test_model_card_names_the_teacher() -> None:
    config = {"model": {"name": "toy"}, "distillation": {"method": "vanilla_kd"}, "teacher": {"path": "runs/teacher"}}
    card = model_card(ModelArchitecture(1, 8, 8, 1, 1, vocab_size=5), {**MANIFEST, "config": config})
    assert "vanilla_kd from the teacher runs/teacher" in card


ARCHITECTURE = ModelArchitecture(1, 8, 8, 1, 1, vocab_size=5)
TRAINED = {
    "config": {
        "model": {"name": "qwen_200m", "init_from": "checkpoints/start"},
        "distillation": {"method": "vanilla_kd", "divergence": "forward_kl", "kd_ratio": 0.5, "temperature": 1.0},
        "teacher": {"path": "runs/teacher"},
    },
    "progress": {"step": 1200, "tokens": 3_000_000, "incidents": {"skipped_batches": 2}},
    "train_flops": 1.5e18,
    "seq_length": 1024,
    "precision": "bf16",
    "dataset_path": "data/selected",
    "dataset_fingerprint": "f00d",
    "dataset_parents": [{"kind": "chunk_dataset", "path": "data/all", "role": "corpus"}],
    "tokenizer_hash": "beef",
    "evaluation": {"heldout_loss": 3.14159, "tokens": 5000},
}


def test_a_trained_model_tells_method_tokens_flops_lineage_and_evaluation():
    card = model_card(ARCHITECTURE, TRAINED)
    for line in (
        "# qwen_200m",
        "- method: vanilla_kd from the teacher runs/teacher (divergence forward_kl, kd_ratio 0.5, temperature 1.0)",
        "- steps: 1,200, predicted tokens: 3,000,000",
        "- training FLOPs, the teacher's passes counted: 1.500e+18",
        "- started from: `checkpoints/start`",
        "- sequence length: 1024, precision: bf16",
        "- batches skipped: 2",
        "- dataset: data/selected (fingerprint f00d)",
        "- made from chunk dataset `data/all` as corpus",
        "- tokenizer hash: beef",
        "| heldout loss | 3.1416 |",
        "| tokens | 5,000 |",
    ):
        assert line in card.splitlines(), line


def test_a_converted_model_is_not_said_to_be_trained():
    parents = [{"kind": "hf_folder", "path": "/models/x"}]
    card = model_card(ARCHITECTURE, {"config": {}, "parents": parents, "progress": {"step": 0}})
    assert "- converted from hf folder `/models/x`; not trained here" in card
    for word in ("steps", "FLOPs", "dataset:", "## Evaluation", "batches skipped"):
        assert word not in card, word


def test_it_begins_with_the_header_that_the_hub_reads():
    assert model_card(ARCHITECTURE, TRAINED).startswith("---\nlibrary_name: transformers\n")
