from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.data.batch import make_batch
from megatron_kd.data.blend import CYCLE, BlendedDataset, BlendedOrder, open_data, slots_per_cycle
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_order import BatchSchedule, ChunkOrder
from megatron_kd.errors import ConfigError, DataError
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset


@pytest.fixture
def parts(tmp_path: Path) -> list[ChunkDataset]:
    """Datasets of 30, 50 and 7 chunks; every id of one is 10, 20 or 30."""
    return [
        write_chunk_dataset(
            tmp_path / str(number),
            (np.full(1 + k % 9, value) for k in range(count)),
            plain_tokenizer_info(100),
            8 + number,
        )
        for number, (value, count) in enumerate([(10, 30), (20, 50), (30, 7)])
    ]


def test_each_dataset_has_its_share_everywhere(parts: list[ChunkDataset]) -> None:
    order = BlendedOrder(BlendedDataset(parts, [5, 3, 2]), seed=1)
    for first in (0, 1000, CYCLE - 100, 3 * CYCLE + 77, 10**9):
        chunks = order.chunks_at(np.arange(first, first + 1000))
        shares = [((chunks >= low) & (chunks < high)).mean() for low, high in ((0, 30), (30, 80), (80, 87))]
        assert np.allclose(shares, [0.5, 0.3, 0.2], atol=0.004)


def test_every_dataset_goes_through_its_own_epochs(parts: list[ChunkDataset]) -> None:
    """Sample k of dataset d is what its own order has at k, whatever the position; nothing skipped or repeated."""
    blend = BlendedDataset(parts, [1, 1, 8])
    for shuffle in (True, False):
        order = BlendedOrder(blend, seed=4, shuffle=shuffle)
        chunks = order.chunks_at(np.arange(2 * CYCLE + 5000))
        for number, (low, high) in enumerate(((0, 30), (30, 80), (80, 87))):
            own = chunks[(chunks >= low) & (chunks < high)] - low
            size = high - low
            epochs = own[: len(own) // size * size].reshape(-1, size)
            assert (np.sort(epochs, axis=1) == np.arange(size)).all(), number
            assert shuffle != (epochs == np.arange(size)).all()


@settings(deadline=None, max_examples=40)
@given(positions=st.lists(st.integers(0, 10**12), min_size=1, max_size=30), seed=st.integers(0, 5))
def test_a_position_gives_the_same_chunk_in_any_company(positions: list[int], seed: int) -> None:
    blend = BlendedDataset.__new__(BlendedDataset)
    blend.datasets = [type("D", (), {"num_chunks": count})() for count in (3, 10**8, 17)]
    blend.counts, blend.num_chunks = slots_per_cycle([0.1, 3.0, 1.7], 3), 10**8 + 20
    blend.starts = np.array([0, 3, 3 + 10**8, 20 + 10**8])
    order = BlendedOrder(blend, seed)
    together = order.chunks_at(np.array(positions))
    assert [order.chunk_at(position) for position in positions] == together.tolist()
    assert together.min() >= 0 and together.max() < 10**8 + 20


def test_batches_hold_the_chunks_of_their_datasets(parts: list[ChunkDataset]) -> None:
    blend = BlendedDataset(parts, [1, 1, 1])
    assert blend.seq_length == 10 and len(blend) == 87
    indices = np.array([0, 86, 31, 79, 29])
    ids, lengths = blend.gather(indices, 11)
    assert lengths.tolist() == [len(blend[index]) for index in indices]
    assert [row[0] for row in ids.tolist()] == [10, 30, 20, 20, 10]
    batch = make_batch(blend, indices, 10)
    for row, index in enumerate(indices.tolist()):
        assert batch.tokens[row][: lengths[row] - 1].tolist() == blend[index][:-1].tolist()
    layouts = []
    for ranks, size in ((1, 12), (2, 3), (4, 1)):
        schedule = BatchSchedule(blend.order(3, True), 12)
        cut = [schedule.micro_batches(5, rank, ranks, size) for rank in range(ranks)]
        layouts.append(np.stack(cut, axis=1).reshape(-1).tolist())
    assert layouts[0] == layouts[1] == layouts[2]


def test_one_dataset_stays_itself_and_several_go_by_size(parts: list[ChunkDataset]) -> None:
    assert isinstance(open_data(str(parts[0].path)), ChunkDataset)
    assert isinstance(parts[0].order(1, True), ChunkOrder)
    blend = open_data([str(part.path) for part in parts])
    assert isinstance(blend, BlendedDataset)
    assert np.allclose(np.array(blend.counts) / CYCLE, np.array([30, 50, 7]) / 87, atol=1e-4)
    assert blend.fingerprint != open_data([str(part.path) for part in parts], [1, 1, 1]).fingerprint


def test_what_does_not_go_together_is_refused(tmp_path: Path, parts: list[ChunkDataset]) -> None:
    other = write_chunk_dataset(tmp_path / "other", [np.array([1, 2])], plain_tokenizer_info(50), 8)
    with pytest.raises(DataError, match="has tokenizer plain-50-0, .* has plain-100-0"):
        BlendedDataset([parts[0], other], [1, 1])
    for weights, message in (
        ([1], "1 values for 2"),
        ([1, 0], "positive"),
        ([1, float("nan")], "positive"),
        ([1, 1e9], "below"),
    ):
        with pytest.raises(ConfigError, match=message):
            BlendedDataset(parts[:2], weights)
