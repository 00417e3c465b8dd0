"""The dataset as a source of micro-batches."""

from megatron_kd.training.methods.source import DatasetSource, Place
from tests.unit.training.methods.made_batches import dataset_batches


def test_the_dataset_source_gives_what_it_is_given():
    batches = dataset_batches()
    made = DatasetSource().batches(Place(0, 1, 0), batches)
    assert made.batches[0] is batches[0] and made.scheduled and not DatasetSource().state()
