"""A disk that fills during a save: exit status 2, one line, no hang; the previous checkpoint still loads."""

import resource
import subprocess

import pytest

from megatron_kd.checkpoints.weights import open_checkpoint
from tests.end_to_end.commands import SMALL, run

FILE_BYTES = 300_000  # less than the largest file of a checkpoint of the smallest model, more than any other file


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))


def settings(dataset, output, steps):
    return [
        f"data.path={dataset.path}",
        f"output={output}",
        *SMALL,
        f"training.train_iters={steps}",
        "training.save_interval=2",
    ]


def check_refused(ended, output):
    ours = [line for line in ended.stderr.replace("\r", "\n").splitlines() if "could not be written" in line]
    assert len(ours) == 1 and "is the disk full (" in ours[0] and "step_4" in ours[0], ended.stderr
    assert ended.stderr.count("Traceback") <= ended.stderr.count("ChildFailedError"), ended.stderr
    assert [path.name for path in (output / "checkpoints").iterdir() if path.name.startswith("step_")] == ["step_2"]
    info = open_checkpoint(output)
    info.verify()
    assert info.path.name == "step_2"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_files_that_may_not_grow(ranks, dataset, tmp_path):
    output = tmp_path / "run"
    assert run("train", *settings(dataset, output, 2)).status == 0
    ended = run("train", *settings(dataset, output, 6), ranks=ranks, before=limit_file_size)
    assert ended.status == (2 if ranks == 1 else 1)  # torchrun's own
    check_refused(ended, output)
    if ranks == 1:
        assert len(ended.lines) == 2 and ended.lines[0].endswith("resumed at step 2"), ended.stderr
        ended = run("train", *settings(dataset, output, 4))
        assert (
            ended.status == 0 and "resumed at step 2" in ended.stderr and open_checkpoint(output).path.name == "step_4"
        )


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of 2.5 MB, one and a half checkpoints, where the machine lets us."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk, dataset):
    output = small_disk / "run"
    ended = run("train", *settings(dataset, output, 4), "training.keep_checkpoints=5")
    assert ended.status == 2
    check_refused(ended, output)


def test_the_main_rank_alone_cannot_write(dataset, tmp_path):
    """The other rank waits inside Megatron-Core's save; it must end, quietly."""
    output, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(MAIN_RANK_CANNOT_WRITE)
    ended = run("train", *settings(dataset, output, 6), ranks=2, program=program, timeout=120)
    check_refused(ended, output)


MAIN_RANK_CANNOT_WRITE = """
from megatron_kd.logs import silence_known_noise
silence_known_noise()
from megatron.core.dist_checkpointing import serialization
real = serialization.save_config
def save_config(config, folder):
    if "step_4" in str(folder):
        raise OSError(28, "No space left on device")
    real(config, folder)
serialization.save_config = save_config
from megatron_kd.cli import main
if __name__ == "__main__":
    main("train")
"""
