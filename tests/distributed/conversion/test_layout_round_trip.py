"""Hugging Face → checkpoint → a model under TP2·PP2 → its checkpoint → Hugging Face: every bit comes back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import call_verb
from tests.reference.hf_models import make_hf_folder


def save_under(layout: dict, checkpoint: str, output: str) -> None:
    """Load a checkpoint into a model of this layout and write the model's own."""
    from megatron_kd.checkpoints.checkpoint_writer import CheckpointWriter, write_checkpoint_manifest
    from megatron_kd.checkpoints.sharded_state import sharded_weights
    from megatron_kd.checkpoints.weights import load_weights, open_checkpoint
    from megatron_kd.models.gpt import build_model
    from megatron_kd.parallel.groups import create_process_groups
    from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
    from megatron_kd.parallel.runtime import distributed_runtime

    with distributed_runtime() as runtime:
        info = open_checkpoint(checkpoint)
        plan = ParallelLayout.for_world(ParallelConfig(**layout), runtime.world_size)
        groups = create_process_groups(plan)
        chunks = build_model(
            info.architecture, plan, groups, precision="fp32", device=runtime.device, max_sequence_length=32
        )
        load_weights(chunks, groups, info)
        kept = ("tokenizer_hash", "eos_id", "seq_length", "precision", "progress", "config")
        about = {**{key: info.manifest[key] for key in kept}, "tokenizer_path": str(info.path / "tokenizer")}
        writer = CheckpointWriter(Path(output))
        state = {f"model{i}": sharded_weights(chunk, groups) for i, chunk in enumerate(chunks)}
        writer.begin(
            0, state, lambda folder, checksums: write_checkpoint_manifest(folder, checksums, info.architecture, about)
        )
        writer.finish()


@pytest.mark.parametrize("case", ["Qwen2.5 tied", "Qwen1.5 untied", "Qwen3 tied, wide heads", "Llama 3.1", "Mistral"])
def test_every_bit_comes_back_through_tensor_and_pipeline_parallelism(case, tmp_path):
    source = make_hf_folder(tmp_path / "hf", case)
    one, four = shared_ranks(1), shared_ranks(4)
    keys = [f"input={source}", f"output={tmp_path / 'imported'}", "verify=false"]
    one.run(call_verb, "megatron_kd.conversion.convert_from_hf", "ConvertFromHFConfig", keys)
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    four.run(save_under, layout, str(tmp_path / "imported"), str(tmp_path / "checkpoints"))
    assert len(list((tmp_path / "checkpoints" / "step_0").glob("*.distcp"))) == 4
    keys = [f"input={tmp_path / 'checkpoints'}", f"output={tmp_path / 'again'}"]
    one.run(call_verb, "megatron_kd.conversion.convert_to_hf", "ConvertToHFConfig", keys)
    ours = load_file(tmp_path / "again" / "model.safetensors")
    expected = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
