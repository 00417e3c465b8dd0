from pathlib import Path

import numpy as np

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import write_chunk_dataset
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer
from megatron_kd.data.tokenizer_info import plain_tokenizer_info


def test_files_travel_with_the_dataset(tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    dataset = write_chunk_dataset(tmp_path / "d", [np.arange(5)], tokenizer.info, 8)
    assert load_tokenizer(dataset.tokenizer_path).info.hash == tokenizer.info.hash
    dataset.verify()
    derived = write_chunk_dataset(tmp_path / "e", [np.arange(5)], dataset.tokenizer_info(), 8)
    assert derived.fingerprint == dataset.fingerprint
    for name, contents in tokenizer.info.files.items():
        assert (derived.tokenizer_path / name).read_bytes() == contents


def test_synthetic_data_has_a_tokenizer_without_files(dataset: ChunkDataset) -> None:
    assert not dataset.tokenizer_path.exists()
    assert dataset.token_byte_lengths.tolist() == [0] + [1] * 99
    other = plain_tokenizer_info(100, eos_id=5)
    assert other.hash != dataset.tokenizer_hash
    assert (other.eos_id, other.pad_id, other.token_byte_lengths[5], other.token_byte_lengths.sum()) == (5, 5, 0, 99)
