"""Folders of every family to checkpoints and back: equal logits, every bit comes back; what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kd.checkpoints.hf_folder import HFFolder
from megatron_kd.checkpoints.weights import open_checkpoint
from megatron_kd.conversion import convert_from_hf as import_hf
from megatron_kd.conversion import convert_to_hf as export_hf
from megatron_kd.conversion.conversion_config import ConvertFromHFConfig, ConvertToHFConfig
from megatron_kd.errors import CheckpointError, DataError
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.hf_models import FAMILY_CASES, make_hf_folder
from tests.reference.one_rank import tiny_model


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def import_folder(source, output, **keys):
    return import_hf.run(ConvertFromHFConfig(input=str(source), output=str(output), **keys))


def export_folder(source, output, **keys):
    return export_hf.run(ConvertToHFConfig(input=str(source), output=str(output), **keys))


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_logits_agree_and_every_bit_comes_back(case, tmp_path):
    source = make_hf_folder(tmp_path / "hf", case)
    checkpoint = import_folder(source, tmp_path / "checkpoint")  # verify compares the logits, 1e-4
    open_checkpoint(checkpoint).verify()
    again = export_folder(checkpoint, tmp_path / "again", max_shard_size="60KB")
    ours, expected = tensors(again), tensors(source)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    assert len(list(again.glob("*.safetensors"))) > 2
    assert (again / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, again))
    for key in ("model_type", "architectures", "hidden_size", "num_key_value_heads", "tie_word_embeddings"):
        assert before[key] == after[key], key
    assert before["rope_parameters"].items() <= after["rope_parameters"].items()


def test_bfloat16_stays_bfloat16_and_float16_becomes_float32(tmp_path, capsys):
    for dtype, stored in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        source = make_hf_folder(tmp_path / str(dtype) / "hf", "Qwen2.5 tied", dtype)
        assert open_checkpoint(source).manifest["precision"] == {torch.bfloat16: "bf16", torch.float32: "fp32"}[stored]
        checkpoint = import_folder(source, tmp_path / str(dtype) / "checkpoint")
        ours = tensors(export_folder(checkpoint, tmp_path / str(dtype) / "again"))
        for name, tensor in tensors(source).items():
            assert ours[name].dtype == stored and torch.equal(ours[name], tensor.to(stored)), name
    assert "float16 becomes float32" in capsys.readouterr().err


def test_verification_finds_a_wrong_table(tmp_path, monkeypatch):
    """What a wrong interleaving of Q, K and V would do."""
    from megatron_kd.checkpoints.rules import MergeQKV

    real = MergeQKV.to_mcore
    monkeypatch.setattr(MergeQKV, "to_mcore", lambda *arguments: real(*arguments).roll(8, 0))
    source = make_hf_folder(tmp_path / "hf", "Llama 3.1")
    with pytest.raises(CheckpointError, match="the imported model's logits differ"):
        import_folder(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_wrong_rotary_scaling_is_found(tmp_path):
    source = make_hf_folder(tmp_path / "hf", "Llama 3.1")
    checkpoint = import_folder(source, tmp_path / "checkpoint")
    manifest = open_checkpoint(checkpoint).manifest["architecture"]
    assert manifest["rope_scaling_factor"] == 8.0 and manifest["rope_original_positions"] == 16
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    unscaled = import_folder(source, tmp_path / "plain", verify=False)
    (source / "config.json").write_text(json.dumps(config))
    from megatron_kd.checkpoints.weights import load_whole_model
    from megatron_kd.conversion.parity import compare_logits
    from megatron_kd.parallel.runtime import distributed_runtime

    with distributed_runtime():
        model, _ = load_whole_model(unscaled)
        with pytest.raises(CheckpointError, match="logits differ"):
            compare_logits(model, source, "the")


def test_another_tokenizer_is_not_exported(tmp_path):
    source, other = make_hf_folder(tmp_path / "hf", "Qwen2.5 tied"), tmp_path / "other"
    checkpoint = import_folder(source, tmp_path / "checkpoint", verify=False)
    trained_with = open_checkpoint(checkpoint).tokenizer_hash
    other.mkdir()
    content = json.loads((source / "tokenizer.json").read_text())
    first, second = [token for token, number in content["model"]["vocab"].items() if number in (7, 8)]
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"other holds the tokenizer .*was trained with {trained_with}: give"):
        export_folder(checkpoint, tmp_path / "again", tokenizer=str(other))
    assert not (tmp_path / "again").exists()
    (other / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    export_folder(checkpoint, tmp_path / "again", tokenizer=str(other), verify=False)


@pytest.fixture
def folder(tmp_path):
    """One folder to break."""
    return make_hf_folder(tmp_path / "hf", "Qwen2.5 tied", shard_size="5GB")


def refuse(folder, tmp_path, match):
    with pytest.raises(CheckpointError, match=match):
        import_folder(folder, tmp_path / "checkpoint", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"], "nothing half made"


def change_config(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, change):
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_unknown_tensors_are_listed(folder, tmp_path):
    def change(held):
        del held["model.norm.weight"]
        held["model.layers.0.self_attn.rotary.secret"] = torch.zeros(2)

    change_tensors(folder, change)
    refuse(folder, tmp_path, "lacks 'model.norm.weight'; it has unknown 'model.layers.0.self_attn.rotary.secret'")


def test_a_tensor_of_another_shape_is_refused(folder, tmp_path):
    change_tensors(folder, lambda held: held.update({"model.norm.weight": torch.zeros(47)}))
    refuse(folder, tmp_path, "'decoder.final_layernorm.weight' have shape .47. together")


@pytest.mark.parametrize(
    ("name", "rows", "named"),
    [
        ("model.norm.weight", 1, "model.norm.weight"),
        ("model.norm.weight", 60, "model.norm.weight"),
        ("model.layers.0.self_attn.o_proj.weight", 40, "o_proj"),
        ("model.layers.0.self_attn.o_proj.weight", 56, "o_proj"),
        ("model.layers.1.mlp.up_proj.weight", 90, "gate_proj"),
        ("model.layers.1.self_attn.v_proj.weight", 48, "q_proj"),
    ],
)
def test_rows_too_few_or_too_many_are_not_loaded(folder, name, rows, named):
    """Where a vocabulary gets rows of zeros, a folder that is read without a conversion must not."""

    def change(held):
        whole = torch.cat([held[name]] * (rows // len(held[name]) + 1))
        held[name] = whole[:rows].clone()

    change_tensors(folder, change)
    with distributed_runtime(), pytest.raises(CheckpointError, match=f"{named}.*does not fit the architecture"):
        HFFolder(folder).load_into([tiny_model(HFFolder(folder).architecture)])


def test_gate_and_up_that_make_up_for_each_other_are_refused(folder, tmp_path):
    def change(held):
        gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
        held[gate], held[up] = held[gate][:-2].clone(), torch.cat([held[up], held[up][:2]])

    change_tensors(folder, change)
    refuse(folder, tmp_path, "gate_proj.weight' of shape .* does not fit the architecture")


def test_other_files_that_make_no_sense_are_one_error(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"bos_token_id": ')
    refuse(folder, tmp_path, "generation_config.json: cannot be read")
    (folder / "generation_config.json").unlink()
    change_config(folder, bos_token_id="<s>")
    refuse(folder, tmp_path, "bos_token_id must be a whole number, not '<s>'")
    with pytest.raises(CheckpointError, match="bos_token_id"):
        open_checkpoint(folder)


def test_other_dtypes_are_refused(folder, tmp_path):
    change_tensors(folder, lambda held: held.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    refuse(folder, tmp_path, "float32, bfloat16 and float16 are supported")


def test_pickled_weights_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, tmp_path, "only safetensors are read")


def test_custom_code_is_never_run(folder, tmp_path):
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil")
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    refuse(folder, tmp_path, "model_type is 'evil', where these are supported: qwen2")
    change_config(folder, model_type="qwen2")
    import_folder(folder, tmp_path / "checkpoint")


def test_no_folder_no_tokenizer_and_an_existing_output(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no config.json there"):
        import_folder(tmp_path / "nowhere", tmp_path / "checkpoint")
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="already exists"):
        import_folder(folder, tmp_path / "taken")
    (tmp_path / "taken").rmdir()
    (folder / "tokenizer.json").unlink()
    refuse(folder, tmp_path, "tokenizer")


@pytest.mark.parametrize("how", ["bit flipped", "truncated"])
def test_a_damaged_checkpoint_is_not_exported(folder, tmp_path, how):
    """The checksums are compared while the tensors are read: the error is theirs, whatever the damage led to."""
    checkpoint = import_folder(folder, tmp_path / "checkpoint", verify=False)
    file = checkpoint / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if how == "bit flipped" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is damaged: .*__0_0.distcp"):
        export_folder(checkpoint, tmp_path / "again", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf"]
