"""One dataset and one teacher for the commands."""

import pytest

from tests.distributed.training.runs import make_dataset
from tests.end_to_end.commands import SMALL, run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """96 chunks of at most 33 ids."""
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks")


@pytest.fixture(scope="session")
def teacher(dataset, tmp_path_factory):
    """The run folder of a teacher with two checkpoints."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    ended = run(
        "train",
        f"data.path={dataset.path}",
        f"output={folder}",
        *SMALL,
        "training.train_iters=4",
        "training.save_interval=2",
        "training.seed=77",
    )
    assert ended.status == 0, ended.stderr
    return folder
