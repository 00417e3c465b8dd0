"""The dataset and the teacher of the layouts' tests."""

from tests.distributed.training.conftest import dataset, teacher  # noqa: F401
