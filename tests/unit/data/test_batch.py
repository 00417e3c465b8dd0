from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.data.batch import TextBytes, content_key, derived_key, make_batch, moved
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

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


def test_equal_batches_have_equal_keys_and_others_do_not(dataset: ChunkDataset) -> None:
    one = make_batch(dataset, np.array([3, 4]), 16)
    assert one.key == make_batch(dataset, np.array([3, 4]), 16).key
    assert one.key not in [make_batch(dataset, np.array(pair), 16).key for pair in ([4, 3], [3, 5])]
    assert 0 <= one.key < 2**63 and 0 <= derived_key(one.key, "student text") < 2**63
    assert len({one.key, derived_key(one.key, "student text"), derived_key(one.key, "rollout")}) == 3
    labels = one.labels.numpy().copy()
    labels[0, -1] ^= 1  # the last label is in no input
    assert content_key(one.tokens.numpy(), labels) != one.key == content_key(one.tokens.numpy(), one.labels.numpy())


@dataclass(frozen=True)
class Weights:
    """A method's payload."""

    role: ClassVar[str] = "selected"
    values: torch.Tensor

    def to(self, device: torch.device | str) -> "Weights":
        return Weights(moved(self.values, device))


def test_batches_move_between_devices_with_key_and_payload(dataset: ChunkDataset) -> None:
    plain = make_batch(dataset, np.array([1]), 16)
    assert plain.role == "main" and plain.to("meta").payload is None
    batch = replace(plain, payload=Weights(torch.ones(1, 16)))
    there = batch.to("meta")
    tensors = [value for value in vars(there).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and {tensor.device.type for tensor in tensors} == {"meta"}
    assert there.payload.values.device.type == "meta"
    assert (there.key, there.role) == (batch.key, "selected") and batch.payload.values.device.type == "cpu"


@pytest.mark.gpu
def test_copies_to_and_from_a_gpu_can_be_read_at_once(dataset: ChunkDataset) -> None:
    """A copy to the host that did not wait would hold whatever the memory held before."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ids = torch.randint(0, 1000, (64, 65536), device="cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy.softmax(0)
    changed = ids + 1  # waits behind the products
    assert torch.equal(moved(changed, "cpu"), ids.cpu() + 1)
    pinned = ids.cpu().pin_memory()
    assert torch.equal(moved(pinned, "cuda"), ids)


def test_a_chunk_that_does_not_fit_is_refused(dataset: ChunkDataset) -> None:
    with pytest.raises(DataError, match="set data.seq_length to the dataset's 16"):
        make_batch(dataset, np.array([int(dataset.lengths.argmax())]), 3)
