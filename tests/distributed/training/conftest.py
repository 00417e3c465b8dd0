"""One dataset, one teacher and one reference run for all layouts."""

import pytest

from tests.distributed.training.runs import make_dataset, train_in_ranks


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A small chunk dataset."""
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks")


@pytest.fixture(scope="session")
def teacher(dataset, tmp_path_factory):
    """The run folder of a briefly trained teacher with another depth and width than the student."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train_in_ranks(
        "TP1 PP1",
        [
            f"data.path={dataset.path}",
            "model.name=qwen_toy_reference",
            "training.train_iters=15",
            "training.global_batch_size=8",
            "training.micro_batch_size=8",
        ],
        folder,
    )
    return folder
