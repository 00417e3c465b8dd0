from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.data.batch import TextBytes, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import write_chunk_dataset
from megatron_kd.data.tokenizer_info import plain_tokenizer_info
from megatron_kd.errors import DataError

EOS = 0


def test_the_mask_by_hand(tmp_path: Path) -> None:
    """Predicting eos counts, predicting from eos does not, padding does not; positions are not reset."""
    chunks = [np.array([5, 6, EOS, 7, 8]), np.array([EOS, 9, 4]), np.array([3]), np.array([EOS, EOS])]
    dataset = write_chunk_dataset(tmp_path / "d", chunks, plain_tokenizer_info(10, EOS), 4)
    batch = make_batch(dataset, np.array([0, 1, 2, 3]), 4)
    assert batch.tokens.tolist() == [[5, 6, 0, 7], [0, 9, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 0, 7, 8], [9, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 4
    assert batch.num_unmasked() == 4
    assert [dataset.has_unmasked_position(index) for index in range(4)] == [True, True, False, False]


@settings(deadline=None, max_examples=40)
@given(
    lists=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=6), extra=st.integers(0, 3)
)
def test_against_a_literal_loop(tmp_path_factory: pytest.TempPathFactory, lists: list[list[int]], extra: int) -> None:
    chunks = [np.array(ids) for ids in lists]
    tokenizer = plain_tokenizer_info(7, eos_id=2)
    dataset = write_chunk_dataset(tmp_path_factory.mktemp("b") / "d", chunks, tokenizer, 8)
    batch = make_batch(dataset, np.arange(len(chunks)), 8 + extra)
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    bytes_expected = 0
    for row, ids in enumerate(lists):
        for position in range(8 + extra):
            real = position < len(ids) - 1
            counts = real and ids[position] != 2
            assert batch.tokens[row, position] == (ids[position] if real else 2)
            assert batch.labels[row, position] == (ids[position + 1] if real else 2)
            assert batch.loss_mask[row, position] == counts
            bytes_expected += counts and ids[position + 1] != 2  # one byte an id, none for eos
    assert TextBytes(dataset.token_byte_lengths)(batch) == bytes_expected


def test_equal_batches_have_equal_hashes_and_others_do_not(dataset: ChunkDataset) -> None:
    one = make_batch(dataset, np.array([3, 4]), 16)
    assert one.token_hash() == make_batch(dataset, np.array([3, 4]), 16).token_hash()
    others = [make_batch(dataset, np.array(pair), 16).token_hash() for pair in ([4, 3], [3, 5])]
    assert one.token_hash() not in others
    assert 0 <= one.token_hash() < 2**63
    longest = int(dataset.lengths.argmax())
    whole = make_batch(dataset, np.array([longest]), int(dataset.lengths[longest]) - 1)
    changed = whole.labels.clone()
    changed[0, -1] ^= 1  # the last label is in no input
    assert type(whole)(whole.tokens, changed, *list(vars(whole).values())[2:]).token_hash() != whole.token_hash()


def test_batches_move_between_devices(dataset: ChunkDataset) -> None:
    batch = make_batch(dataset, np.array([1]), 16).to("meta")
    assert {tensor.device.type for tensor in vars(batch).values()} == {"meta"}


def test_a_chunk_that_does_not_fit_is_refused(dataset: ChunkDataset) -> None:
    with pytest.raises(DataError, match="set data.seq_length to the dataset's 16"):
        make_batch(dataset, np.array([int(dataset.lengths.argmax())]), 3)
