"""Checkpoints as weights: saved and loaded ones are equal, paths that name them, which models may read a dataset."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from megatron_kd.checkpoints.weights import (
    LATEST_NAME,
    check_same_architecture,
    check_same_tokenizer,
    checkpoint_folders,
    load_weights,
    open_checkpoint,
)
from megatron_kd.errors import CheckpointError
from megatron_kd.models.parameters import weights_fingerprint
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.checkpoint import Progress
from tests.distributed.training.runs import make_dataset
from tests.reference.one_rank import TINY, TrainingParts, tiny_model
from tests.reference.saved_checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with steps 2 and 10; beside it the fingerprint of its weights."""
    root = tmp_path_factory.mktemp("weights")
    dataset = make_dataset(root / "data", chunks=8)
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime, seed=3)
        for step in (2, 10):
            save_checkpoint(
                root / "run" / "checkpoints",
                Progress(step),
                parts.model,
                parts.optimizer,
                parts.groups,
                architecture=parts.architecture,
                about={"tokenizer_hash": dataset.tokenizer_hash},
            )
        (root / "fingerprint").write_text(weights_fingerprint([parts.model[0].module], parts.groups.tp))
    return root / "run"


def test_folder_run_folder_and_checkpoints_folder(run_folder):
    newest = run_folder / "checkpoints" / "step_10"
    assert [open_checkpoint(path).path for path in (run_folder, run_folder / "checkpoints", newest)] == [newest] * 3
    assert open_checkpoint(run_folder / "checkpoints" / "step_2").manifest["progress"]["step"] == 2
    assert [folder.name for folder in checkpoint_folders(run_folder / "checkpoints")] == ["step_10", "step_2"]


def test_without_latest_the_highest_number_is_used_and_temporary_folders_never(run_folder, tmp_path, capsys):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    (copy / "checkpoints" / LATEST_NAME).write_text("step_99\n")
    (copy / "checkpoints" / "step_50.tmp-1-abc").mkdir()
    assert open_checkpoint(copy).path.name == "step_10"
    for damaged in (b"", b"\n", b".\n", b"..", b"step_50.tmp-1-abc", b"\xff\x00"):
        (copy / "checkpoints" / LATEST_NAME).write_bytes(damaged)
        assert open_checkpoint(copy).path.name == "step_10"
        assert "names no checkpoint" in capsys.readouterr().err
    (copy / "checkpoints" / LATEST_NAME).unlink()
    assert open_checkpoint(copy).path.name == "step_10"


def test_paths_without_a_checkpoint_are_refused(run_folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint or run folder"):
        open_checkpoint(tmp_path / "missing")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        open_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match="manifest.json: missing"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a chunk dataset, where a checkpoint is needed"):
        open_checkpoint(run_folder.parent / "data")


def test_weights_are_those_that_were_saved(run_folder):
    info = open_checkpoint(run_folder)
    with distributed_runtime():
        model = tiny_model(info.architecture, seed=99)
        load_weights([model], model.pg_collection, info)
        assert weights_fingerprint([model], model.pg_collection.tp) == (run_folder.parent / "fingerprint").read_text()


def test_a_damaged_file_is_refused_before_loading(run_folder, tmp_path):
    copy = shutil.copytree(run_folder / "checkpoints" / "step_10", tmp_path / "copy")
    largest = max(copy.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-20] ^= 1
    largest.write_bytes(data)
    info = open_checkpoint(copy)
    with distributed_runtime():
        model = tiny_model(info.architecture, seed=99)
        before = model.decoder.final_layernorm.weight.clone()
        with pytest.raises(CheckpointError, match=f"is damaged: .*{largest.name}: block"):
            load_weights([model], model.pg_collection, info)
        assert torch.equal(model.decoder.final_layernorm.weight, before)


def test_another_models_weights_are_refused(run_folder):
    info = open_checkpoint(run_folder)
    with pytest.raises(CheckpointError, match=f"hidden_size {info.architecture.hidden_size} where 32 is asked for"):
        check_same_architecture(info, TINY)
    check_same_architecture(info, info.architecture)
    with distributed_runtime():
        model = tiny_model()
        with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
            load_weights([model], model.pg_collection, info)


DATASET = SimpleNamespace(path="chunks", tokenizer_hash="a", vocab_size=300)


def model(tokenizer_hash, vocab_size):
    return SimpleNamespace(
        path="teacher", tokenizer_hash=tokenizer_hash, architecture=SimpleNamespace(vocab_size=vocab_size)
    )


@pytest.mark.parametrize("rows", [300, 384])
def test_a_model_may_have_more_ids_than_the_tokenizer(rows):
    check_same_tokenizer(model("a", rows), DATASET)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (model("b", 300), "trained with tokenizer b, but the dataset chunks has a"),
        (model("a", 299), "teacher has embeddings for 299 ids, but the tokenizer of the dataset chunks has 300"),
    ],
)
def test_another_tokenizer_and_ids_without_embeddings_are_refused(given, message):
    with pytest.raises(CheckpointError, match=message):
        check_same_tokenizer(given, DATASET)
