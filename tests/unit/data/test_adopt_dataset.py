import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_kd.config import from_mapping
from megatron_kd.data.adopt_dataset import AdoptDatasetConfig, run
from megatron_kd.data.batch import make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.copy_chunks import copy_chunks
from megatron_kd.data.tokenization import LoadedTokenizer
from megatron_kd.errors import DataError
from tests.reference.shards import EOS, sequences, write_megatron, write_miniplm


def config(folder: Path, tokenizer: Path, **changes: object) -> AdoptDatasetConfig:
    tree = {
        "input": f"{folder}/data_*.bin", "sequences": "chunks", "tokenizer": str(tokenizer),
        "output": str(folder / "out"), "data": {"seq_length": 16},
    }  # fmt: skip
    return from_mapping(AdoptDatasetConfig, {**tree, **changes}, "test")


def test_released_chunks_are_used_where_they_are(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [sequences(seed, 30, 17) for seed in range(2)]
    for number, chunks in enumerate(shards):
        write_miniplm(tmp_path / f"data_{number}", chunks)
    path = run(config(tmp_path, tokenizer_folder))
    dataset = ChunkDataset.open(path)
    dataset.verify()
    expected = [chunk.tolist() for chunks in shards for chunk in chunks]
    assert [dataset[index].tolist() for index in range(len(dataset))] == expected
    assert (dataset.path / "chunks-00001.bin").resolve() == tmp_path / "data_1.bin"
    assert sum(file.stat().st_size for file in dataset.path.glob("*.bin") if not file.is_symlink()) == 0
    stock = IndexedDataset(str(dataset.path / "chunks-00001"))
    assert [stock[index].tolist() for index in range(30)] == expected[30:]
    capsys.readouterr()
    run(config(tmp_path, tokenizer_folder))
    assert "already adopted" in capsys.readouterr().err
    writer_folder = tmp_path / "copy"
    writer_folder.mkdir()
    writer = ChunkDatasetWriter(writer_folder, dataset.tokenizer_info(), 16)
    copy_chunks(dataset, np.array([0, 1, 40]), writer)
    writer.finish({"tool": "test"})
    copy = ChunkDataset.open(writer_folder)
    assert [copy[index].tolist() for index in range(3)] == [expected[0], expected[1], expected[40]]


def test_documents_become_windows(tmp_path: Path, tokenizer_folder: Path) -> None:
    files = [sequences(3, 20, 90), sequences(4, 7, 40)]
    for number, documents in enumerate(files):
        write_megatron(tmp_path / f"data_{number}", documents)
    dataset = ChunkDataset.open(run(config(tmp_path, tokenizer_folder, sequences="documents")))
    expected, unused = [], 0
    for documents in files:
        stream = np.concatenate(documents)
        count = len(stream) // 17
        expected += stream[: count * 17].reshape(-1, 17).tolist()
        unused += len(stream) - count * 17
    assert unused and dataset.manifest["producer"]["unused_tokens"] == unused
    assert [dataset[index].tolist() for index in range(len(dataset))] == expected
    ids, lengths = dataset.gather(np.arange(len(dataset)), 17)
    assert ids.tolist() == expected and set(lengths.tolist()) == {17}
    assert make_batch(dataset, np.array([0]), 16).tokens[0].tolist() == expected[0][:-1]
    other = ChunkDataset.open(
        run(config(tmp_path, tokenizer_folder, sequences="documents", data={"seq_length": 8}, output=f"{tmp_path}/o2"))
    )
    assert other.fingerprint != dataset.fingerprint


def test_damage_in_an_adopted_file_is_found(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_miniplm(tmp_path / "data_0", sequences(1, 30, 17))
    path = run(config(tmp_path, tokenizer_folder))
    data = bytearray((tmp_path / "data_0.bin").read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "data_0.bin").write_bytes(data)
    with pytest.raises(DataError, match="block 0 has checksum"):
        ChunkDataset.open(path)[0]
    (tmp_path / "data_0.bin").unlink()
    with pytest.raises(DataError, match="chunks-00000.bin: missing"):
        ChunkDataset.open(path)


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: LoadedTokenizer
) -> None:
    write_megatron(tmp_path / "data_0", sequences(3, 20, 90))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match=r"sequences of \d+ to \d+ ids, where chunks have 1 to 17; .*documents"):
        run(config(tmp_path, tokenizer_folder))
    write_megatron(tmp_path / "data_0", [np.array([5, tokenizer.info.vocab_size, EOS])])
    with pytest.raises(DataError, match="ids from 0 to 600 .*the tokenizer has 600"):
        run(config(tmp_path, tokenizer_folder))
    with pytest.raises(DataError, match="no whole chunk of 17 ids"):
        run(config(tmp_path, tokenizer_folder, sequences="documents", input=str(short(tmp_path / "short"))))
    (tmp_path / "short.bin").unlink()
    (tmp_path / "short.idx").unlink()
    index = bytearray((tmp_path / "data_0.idx").read_bytes())
    index[-8 * 2 - 8] ^= 2  # the only sequence's place
    (tmp_path / "data_0.idx").write_bytes(index)
    with pytest.raises(DataError, match="not stored one after another|copy it again"):
        run(config(tmp_path, tokenizer_folder))
    assert sorted(os.listdir(tmp_path)) == before


def short(prefix: Path) -> Path:
    write_megatron(prefix, [np.array([5, EOS])])
    return prefix.with_suffix(".bin")
