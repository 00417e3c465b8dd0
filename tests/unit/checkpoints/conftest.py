"""The dataset of the training tests, whose checkpoints these tests save."""

from tests.unit.training.conftest import dataset

__all__ = ["dataset"]
