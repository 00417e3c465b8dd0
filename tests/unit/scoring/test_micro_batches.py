"""The plan covers every chunk once, wastes little, and asks nobody about ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.scoring.micro_batches import MicroBatchPlan, width_multiple
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset


class Lengths:
    """As much of a dataset as the plan reads."""

    def __init__(self, lengths: list[int], seq_length: int) -> None:
        self.values, self.seq_length, self.num_chunks = np.array(lengths, dtype=np.int32), seq_length, len(lengths)

    def lengths_between(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 129), min_size=1, max_size=300),
    micro_batch_size=st.integers(1, 9),
    multiple=st.sampled_from([1, 16, 24]),
    per_unit=st.none() | st.integers(1, 50),
)
def test_every_chunk_once_and_in_rows_that_hold_it(lengths, micro_batch_size, multiple, per_unit):
    dataset = Lengths(lengths, 128)
    plan = MicroBatchPlan(dataset, micro_batch_size, multiple, per_unit)
    seen = []
    for unit in range(plan.num_units):
        start, stop = plan.chunk_range(unit)
        micro_batches = plan.unit(unit)
        indices = np.concatenate([micro_batch.indices for micro_batch in micro_batches])
        assert sorted(indices.tolist()) == list(range(start, stop))
        for micro_batch in micro_batches:
            assert dataset.values[micro_batch.indices].max() - 1 <= micro_batch.width <= 128
            assert len(micro_batch.indices) * micro_batch.width <= micro_batch_size * 128
        seen += indices.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_little_padding_is_computed():
    """Lengths from 1 to 1,025: padded to the longest row of 16 neighbours nearly twice as much; here under 4%."""
    lengths = np.random.default_rng(0).integers(1, 1026, 8192)
    plan = MicroBatchPlan(Lengths(lengths.tolist(), 1024), 16, chunks_per_unit=2048)
    computed = sum(np.prod(micro_batch.shape) for unit in range(plan.num_units) for micro_batch in plan.unit(unit))
    needed = np.maximum(lengths - 1, 1).sum()
    naive = (np.maximum(lengths - 1, 1).reshape(-1, 16).max(1) * 16).sum()
    assert computed / needed < 1.04 and naive / needed > 1.8


def test_small_datasets_make_enough_units_for_many_ranks():
    assert MicroBatchPlan(Lengths([9] * 5000, 8), 4).num_units >= 64
    assert MicroBatchPlan(Lengths([9] * 1_000_000, 8), 4).chunks_per_unit == 512
    assert MicroBatchPlan(Lengths([9] * 3, 8), 4).num_units == 1


def test_units_of_small_datasets_have_neighbours_to_choose_from():
    """In units of one micro-batch 1.9 times what is needed was computed."""
    lengths = np.random.default_rng(0).integers(2, 514, 64)
    plan = MicroBatchPlan(Lengths(lengths.tolist(), 512), 8)
    computed = sum(np.prod(micro_batch.shape) for unit in range(plan.num_units) for micro_batch in plan.unit(unit))
    assert computed / (lengths - 1).sum() < 1.3


def test_widths_suit_sequence_parallelism():
    assert width_multiple(8, True) == width_multiple(8, False) == width_multiple(1, False) == 16
    assert width_multiple(3, True) == 48


@pytest.mark.parametrize("interval", [(0, 40), (3, 4), (10, 35), (15, 30), (39, 40), (5, 5)])
def test_lengths_between_reads_over_shards(tmp_path, interval):
    generator = np.random.default_rng(1)
    chunks = [np.ones(generator.integers(1, 10), dtype=np.int64) for _ in range(40)]
    dataset = write_chunk_dataset(tmp_path / "data", chunks, plain_tokenizer_info(5), 9, chunks_per_shard=15)
    assert dataset.lengths_between(*interval).tolist() == dataset.lengths[slice(*interval)].tolist()
