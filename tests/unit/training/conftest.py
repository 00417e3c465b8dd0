"""One small dataset for the training tests."""

import pytest

from tests.distributed.training.runs import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """96 chunks of at most 33 ids below 300."""
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks")
