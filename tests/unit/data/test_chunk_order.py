import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.data.chunk_order import BatchSchedule, ChunkOrder
from megatron_kd.errors import ConfigError


@settings(deadline=None)
@given(num_chunks=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(num_chunks: int, seed: int, epoch: int) -> None:
    order = ChunkOrder(num_chunks, seed)
    positions = np.arange(num_chunks) + epoch * num_chunks
    chunks = order.chunks_at(positions)
    assert sorted(chunks.tolist()) == list(range(num_chunks))
    place = int(chunks[0]) % num_chunks
    assert order.chunk_at(int(positions[place])) == chunks[place]  # one at a time or many: the same


def test_a_huge_order_needs_no_memory_and_does_not_repeat() -> None:
    order = ChunkOrder(10**11, seed=5)
    chunks = order.chunks_at(np.arange(10**5) + 10**11 - 5 * 10**4)  # across the end of the first epoch
    assert chunks.min() >= 0 and chunks.max() < 10**11
    assert len(np.unique(chunks[: 5 * 10**4])) == 5 * 10**4
    assert abs(chunks.mean() / 10**11 - 0.5) < 0.01


def test_epochs_and_seeds_differ_and_the_same_seed_does_not() -> None:
    positions = np.arange(1000)
    first = ChunkOrder(1000, 1).chunks_at(positions)
    assert (first == ChunkOrder(1000, 1).chunks_at(positions)).all()
    for other in (ChunkOrder(1000, 2).chunks_at(positions), ChunkOrder(1000, 1).chunks_at(positions + 1000)):
        assert (first == other).sum() < 20  # about 1 is expected by chance


def test_the_shuffle_looks_uniform() -> None:
    """Where chunk 0 of 50 lands over 20,000 epochs: chi-squared with 49 degrees of freedom, 0.1% bound 85.4."""
    order = ChunkOrder(50, seed=3)
    landed = np.nonzero(order.chunks_at(np.arange(50 * 20_000)).reshape(20_000, 50) == 0)[1]
    counts = np.bincount(landed, minlength=50)
    assert ((counts - 400) ** 2 / 400).sum() < 85.4


def test_without_shuffle_it_is_the_datasets_order() -> None:
    assert ChunkOrder(3, 9, shuffle=False).chunks_at(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 chunks"):
        ChunkOrder(0)


@given(
    num_ranks=st.integers(1, 4),
    num_micro_batches=st.integers(1, 4),
    micro_batch_size=st.integers(1, 3),
    step=st.integers(0, 50),
)
def test_every_layout_cuts_the_same_global_batch(
    num_ranks: int, num_micro_batches: int, micro_batch_size: int, step: int
) -> None:
    size = num_ranks * num_micro_batches * micro_batch_size
    schedule = BatchSchedule(ChunkOrder(101, seed=4), size)
    everything = schedule.chunks(step)
    assert everything.tolist() == schedule.order.chunks_at(np.arange(step * size, (step + 1) * size)).tolist()
    for rank in range(num_ranks):
        mine = schedule.micro_batches(step, rank, num_ranks, micro_batch_size)
        assert mine.shape == (num_micro_batches, micro_batch_size)
        for number in range(num_micro_batches):
            start = (number * num_ranks + rank) * micro_batch_size
            assert mine[number].tolist() == everything[start : start + micro_batch_size].tolist()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    schedule = BatchSchedule(ChunkOrder(10), 6)
    with pytest.raises(ConfigError, match="global_batch_size 6 is not a multiple of data-parallel size 2"):
        schedule.micro_batches(0, 0, 2, 2)
