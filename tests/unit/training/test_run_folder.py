"""A run folder: what is refused before anything is built, and one writer at a time, past forked children and kills."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_kd.errors import CheckpointError, ConfigError
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.checkpoint import Progress
from megatron_kd.training.run_folder import RunLock, checkpoint_to_resume, prepare_run_folder, sole_writer
from tests.distributed.training.runs import make_dataset
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset
from tests.reference.one_rank import TrainingParts, train_config, training_run
from tests.reference.saved_checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def run_folder(dataset, tmp_path_factory):
    """A run with one checkpoint, as the loop writes it."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        save_checkpoint(
            folder / "checkpoints",
            Progress(3),
            parts.model,
            parts.optimizer,
            parts.groups,
            architecture=parts.architecture,
            about={
                "dataset_fingerprint": dataset.fingerprint,
                "tokenizer_hash": dataset.tokenizer_hash,
                "seq_length": dataset.seq_length,
                "config": dataclasses.asdict(parts.config),
            },
        )
    return folder


def resumed(dataset, folder, **keys):
    with distributed_runtime() as runtime:
        return checkpoint_to_resume(training_run(train_config(dataset, folder, **keys), dataset, runtime))


def test_the_same_settings_resume(dataset, run_folder, tmp_path):
    assert resumed(dataset, run_folder).manifest["progress"]["step"] == 3
    assert resumed(dataset, tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"training": {"seed": 11, "global_batch_size": 4, "micro_batch_size": 4}},
            "training.seed 10 where 11 is asked for",
        ),
        ({"training": {"global_batch_size": 8}}, "training.global_batch_size 4 where 8"),
        ({"data": {"path": "x", "shuffle": False}}, "data.shuffle True where False"),
        ({"data": {"path": "x", "seq_length": 40}}, "sequence length 32 where 40"),
        (
            {"distillation": {"method": "gkd"}, "teacher": {"placement": "colocated", "path": "t"}},
            "distillation.method none where gkd is asked for",
        ),
    ],
)
def test_other_settings_are_refused(dataset, run_folder, keys, message):
    with pytest.raises(CheckpointError, match=message):
        resumed(dataset, run_folder, **keys)


def test_another_dataset_is_refused(dataset, run_folder, tmp_path):
    other = make_dataset(tmp_path / "other", seed=4)
    with pytest.raises(CheckpointError, match=f"dataset {dataset.fingerprint} where {other.fingerprint} is asked for"):
        resumed(other, run_folder)


def test_another_dataset_is_taken_when_allowed(dataset, run_folder, tmp_path):
    other = make_dataset(tmp_path / "other", seed=4)
    told = {"global_batch_size": 4, "micro_batch_size": 4, "allow_other_data": True}
    assert resumed(other, run_folder, training=told).manifest["progress"]["step"] == 3


def test_a_dataset_of_another_tokenizer_is_never_taken(dataset, run_folder, tmp_path):
    other = write_chunk_dataset(tmp_path / "other", ([1] * 20 for _ in range(8)), plain_tokenizer_info(300, 5), 32)
    told = {"global_batch_size": 4, "micro_batch_size": 4, "allow_other_data": True}
    with pytest.raises(CheckpointError, match="trained with tokenizer plain-300-0, but the dataset .* plain-300-5"):
        resumed(other, run_folder, training=told)


def test_another_model_is_refused(dataset, run_folder):
    with distributed_runtime() as runtime:
        architecture = dataclasses.replace(TrainingParts(dataset, runtime).architecture, num_layers=1, rope_theta=5.0)
        with pytest.raises(CheckpointError, match="num_layers 2 where 1 is asked for, rope_theta 10000.0 where 5.0"):
            checkpoint_to_resume(training_run(train_config(dataset, run_folder), dataset, architecture=architecture))


def test_output_that_is_a_file(dataset, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is not a folder"):
        resumed(dataset, tmp_path / "file")
    with distributed_runtime():
        with pytest.raises(ConfigError, match="cannot be a run folder"):
            prepare_run_folder(training_run(train_config(dataset, tmp_path / "file" / "below"), dataset))
        for folder, reason in ((tmp_path / "file", "is not a folder"), (tmp_path / "file" / "a", "cannot be a run")):
            with pytest.raises(ConfigError, match=reason), sole_writer(folder):
                pass
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_holds_the_resolved_configuration(dataset, tmp_path):
    with distributed_runtime():
        prepare_run_folder(training_run(train_config(dataset, folder := tmp_path / "a" / "run"), dataset))
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert "method: none" in (folder / "config.yaml").read_text()


def test_one_writer_and_nothing_left_of_its_lock(tmp_path):
    folder = tmp_path / "a" / "run"
    with distributed_runtime():
        with sole_writer(folder), pytest.raises(ConfigError, match="another run is training there"):
            with sole_writer(folder):
                pass
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(CheckpointError), sole_writer(folder):
            raise CheckpointError("of another model")
    assert list(tmp_path.iterdir()) == []


HOLD = (
    "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
    "print('locked', flush=True); time.sleep(60)"
)


def taken(folder):
    lock = RunLock(folder)
    lock.take()
    return lock


def test_one_run_at_a_time(tmp_path):
    folder = tmp_path / "a" / "run"
    first = taken(folder)
    with pytest.raises(ConfigError, match="another run is training there; wait for it, end it or choose another"):
        taken(folder)
    (folder / "config.yaml").touch()
    first.release()
    taken(folder).release()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"], "a folder that holds something stays"


def test_no_folder_is_left_that_was_made_for_the_lock(tmp_path):
    taken(tmp_path / "a" / "run").release()
    (tmp_path / "empty").mkdir()
    taken(tmp_path / "empty").release()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"], "one that was there stays"


def test_a_path_that_cannot_be_a_run_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder, reason in ((tmp_path / "file", "is not a folder"), (tmp_path / "file" / "a", "cannot be a run folder")):
        with pytest.raises(ConfigError, match=reason):
            taken(folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_keep_it(tmp_path):
    lock = taken(tmp_path)
    child = os.fork()
    if child == 0:  # uses nothing of the parent's
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        taken(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_killed_process_leaves_it_to_the_next(tmp_path):
    arguments = [sys.executable, "-S", "-c", HOLD, str(tmp_path / ".writer.lock")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="another run is training there"):
            taken(tmp_path)
        other.kill()
    taken(tmp_path).release()
