"""Checkpoints on one rank: round trip, retention, ``latest``, damage, a disk that fills."""

import shutil

import pytest
import torch

from megatron_kd.checkpoints import checkpoint_writer
from megatron_kd.checkpoints.weights import LATEST_NAME, checkpoint_folders, open_checkpoint
from megatron_kd.errors import CheckpointError, UserError
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.checkpoint import Progress, load_checkpoint, newest_whole_checkpoint
from tests.reference.full_state import load_full_state
from tests.reference.one_rank import TrainingParts
from tests.reference.saved_checkpoint import save_checkpoint


def save(parts, dataset, folder, step, keep=None):
    about = {"tokenizer_hash": dataset.tokenizer_hash, "seq_length": dataset.seq_length, "precision": "fp32"}
    return save_checkpoint(
        folder,
        Progress(step=step, tokens=10 * step, seconds=0.5 * step),
        parts.model,
        parts.optimizer,
        parts.groups,
        architecture=parts.architecture,
        about=about,
        keep=keep,
    )


@pytest.fixture(scope="module")
def saved(dataset, tmp_path_factory):
    """A ``checkpoints/`` folder with steps 1 and 2 of one model; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        save(parts, dataset, folder, 1)
        save(parts, dataset, folder, 2)
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path):
    """A copy of the two checkpoints."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def newest(folder):
    with distributed_runtime():
        return newest_whole_checkpoint(folder)


def test_round_trip_of_weights_moments_and_progress(dataset, tmp_path):
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime, seed=1)
        adam = parts.optimizer.chained_optimizers[0].optimizer
        for number, state in enumerate(adam.state.values()):
            state["step"].fill_(7)
            state["exp_avg"].normal_(generator=torch.Generator().manual_seed(number))
            state["exp_avg_sq"].uniform_(generator=torch.Generator().manual_seed(number))
        path = save(parts, dataset, tmp_path / "checkpoints", 7)
        other = TrainingParts(dataset, runtime, seed=2)
        progress = load_checkpoint(open_checkpoint(path), other.model, other.optimizer, other.groups)
        assert progress == Progress(step=7, tokens=70, seconds=3.5)
        for ours, theirs in zip(parts.model[0].parameters(), other.model[0].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        states = zip(adam.state.values(), other.optimizer.chained_optimizers[0].optimizer.state.values(), strict=True)
        for ours, theirs in states:
            assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
        architecture, state, manifest = load_full_state(path)
    assert architecture == parts.architecture and manifest["progress"]["tokens"] == 70
    assert torch.equal(state["decoder.final_layernorm.weight"], torch.ones(architecture.hidden_size))


def test_retention_and_latest(dataset, tmp_path):
    folder = tmp_path / "checkpoints"
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        for step in (2, 4, 10):
            save(parts, dataset, folder, step, keep=2)
            assert (folder / LATEST_NAME).read_text() == f"step_{step}\n"
    assert [path.name for path in checkpoint_folders(folder)] == ["step_10", "step_4"]
    assert sorted(path.name for path in folder.iterdir()) == [LATEST_NAME, "step_10", "step_4"]
    assert open_checkpoint(tmp_path).path == open_checkpoint(folder).path == folder / "step_10"


def damage(path, how):
    if how == "removed":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:-1]
    else:
        data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "removed"])
def test_damage_to_any_file_is_noticed_and_the_previous_checkpoint_taken(checkpoints, how, capsys):
    names = sorted(file.name for file in (checkpoints / "step_2").iterdir())
    assert {"manifest.json", "checksums.json", ".metadata", "metadata.json"} < set(names) and len(names) >= 5
    for name in names:
        kept = (checkpoints / "step_2" / name).read_bytes()
        damage(checkpoints / "step_2" / name, how)
        assert newest(checkpoints).path.name == "step_1", name
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"step_2/{name}" in said and "resuming from step_1" in said
        (checkpoints / "step_2" / name).write_bytes(kept)
    assert newest(checkpoints).path.name == "step_2"
    assert capsys.readouterr().err == ""


def test_no_whole_checkpoint_and_no_checkpoint(checkpoints, tmp_path):
    for folder in checkpoint_folders(checkpoints):
        damage(folder / "common.pt" if (folder / "common.pt").exists() else folder / ".metadata", "truncated")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left: .*step_2.*step_1"):
        newest(checkpoints)
    assert newest(tmp_path / "nothing") is None


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(checkpoints, dataset):
    damage(checkpoints / "step_2" / ".metadata", "truncated")
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        save(parts, dataset, checkpoints, 2)
    open_checkpoint(checkpoints).verify()
    assert [path.name for path in checkpoint_folders(checkpoints)] == ["step_2", "step_1"]


def test_a_later_damaged_checkpoint_does_not_push_out_whole_ones(checkpoints, dataset):
    (checkpoints / "step_2").rename(checkpoints / "step_9")
    damage(checkpoints / "step_9" / ".metadata", "truncated")
    with distributed_runtime() as runtime:
        save(TrainingParts(dataset, runtime), dataset, checkpoints, 2, keep=2)
    assert [path.name for path in checkpoint_folders(checkpoints)] == ["step_2", "step_1"]


@pytest.mark.parametrize("failing", ["write_manifest", "dist_checkpointing.save"])
def test_a_save_that_fails_leaves_the_previous_checkpoint(checkpoints, dataset, monkeypatch, failing):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    owner = checkpoint_writer.dist_checkpointing if "." in failing else checkpoint_writer
    monkeypatch.setattr(owner, failing.split(".")[-1], full)
    with distributed_runtime() as runtime:
        with pytest.raises(UserError, match="step_3 could not be written: .*No space left on device"):
            save(TrainingParts(dataset, runtime), dataset, checkpoints, 3)
    assert sorted(path.name for path in checkpoints.iterdir()) == [LATEST_NAME, "step_1", "step_2"]
    assert newest(checkpoints).path.name == "step_2"
