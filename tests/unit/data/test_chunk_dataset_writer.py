"""What the writer records: shards, arrays, domains, lineage, and what belongs to a dataset's identity."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.indexed_dataset import IndexedDatasetWriter
from megatron_kd.errors import DataError
from tests.reference.datasets import plain_tokenizer_info

LENGTHS = np.array([3, 1, 5, 2, 4])
IDS = np.arange(1, 16)


def write(output: Path, fill=lambda writer: writer.add(IDS, LENGTHS), **finish: object) -> ChunkDataset:
    with building(output) as folder, closing(ChunkDatasetWriter(folder, plain_tokenizer_info(100), 8, 2)) as writer:
        fill(writer)
        writer.finish({"tool": "test"}, **finish)
    return ChunkDataset.open(output)


def test_shards_are_cut_at_their_size_however_chunks_arrive(tmp_path: Path) -> None:
    def one_by_one(writer: ChunkDatasetWriter) -> None:
        for chunk in np.split(IDS, np.cumsum(LENGTHS)[:-1]):
            writer.add(chunk, np.array([len(chunk)]))

    def bytes_at_once(writer: ChunkDatasetWriter) -> None:
        writer.add_bytes(IDS.astype(writer.dtype).view(np.uint8), LENGTHS)

    whole = write(tmp_path / "whole")
    assert [(shard["name"], shard["chunks"], shard["tokens"]) for shard in whole.manifest["shards"]] == [
        ("chunks-00000", 2, 4),
        ("chunks-00001", 2, 7),
        ("chunks-00002", 1, 4),
    ]
    assert (whole.num_chunks, whole.num_tokens) == (5, 15)
    for name, fill in (("one", one_by_one), ("bytes", bytes_at_once)):
        assert write(tmp_path / name, fill).fingerprint == whole.fingerprint


def test_a_shard_that_was_written_elsewhere(tmp_path: Path) -> None:
    def fill(writer: ChunkDatasetWriter) -> None:
        shard = IndexedDatasetWriter(writer.next_shard_prefix(), writer.dtype)
        shard.add_bytes(IDS[:5].astype(writer.dtype).view(np.uint8), np.array([2, 3]))
        writer.add_shard(shard.close(), 2, 5)
        writer.add(IDS[5:9], np.array([4]))

    dataset = write(tmp_path / "d", fill)
    assert [dataset[index].tolist() for index in range(3)] == [[1, 2], [3, 4, 5], [6, 7, 8, 9]]
    dataset.verify()


def test_what_is_part_of_the_identity(tmp_path: Path) -> None:
    """Content is; who made it, from what, and the report beside it are not."""

    def with_report(writer: ChunkDatasetWriter) -> None:
        writer.add(IDS, LENGTHS)
        writer.add_extra_file("report.md", b"text")

    def with_domains(writer: ChunkDatasetWriter) -> None:
        writer.add(IDS, LENGTHS)
        writer.add_domains(["a", "b"], np.array([0, 1, 1, 0, 0]))

    def with_prompts(writer: ChunkDatasetWriter) -> None:
        writer.add(IDS, LENGTHS)
        writer.mask_prompts = True
        writer.add_array("prompt_lengths.npy", np.array([1, 0, 2, 1, 1], np.int32))

    plain = write(tmp_path / "plain")
    report = write(tmp_path / "report", with_report, parents=[{"kind": "x", "path": "p", "fingerprint": "f"}])
    assert report.fingerprint == plain.fingerprint and report.manifest["parents"][0]["path"] == "p"
    domains, prompts = write(tmp_path / "domains", with_domains), write(tmp_path / "prompts", with_prompts)
    assert len({plain.fingerprint, domains.fingerprint, prompts.fingerprint}) == 3
    assert domains.domain_names == ["a", "b"] and np.asarray(domains.domains).tolist() == [0, 1, 1, 0, 0]
    (tmp_path / "report/report.md").write_bytes(b"texT")
    with pytest.raises(DataError, match="report.md"):
        ChunkDataset.open(tmp_path / "report").verify()


def test_a_selection_names_its_root(tmp_path: Path) -> None:
    root = write(tmp_path / "root")
    ids = np.array([4, 9, 11, 30, 31])
    part = write(tmp_path / "part", root_fingerprint=root.fingerprint, chunk_ids=ids)
    assert root.is_root and root.root_fingerprint == root.fingerprint
    assert not part.is_root and part.root_fingerprint == root.fingerprint and part.fingerprint != root.fingerprint
    assert np.asarray(part.chunk_ids).tolist() == ids.tolist()
    manifest = json.loads((tmp_path / "part/manifest.json").read_text())
    assert manifest["producer"] == {"tool": "test"} and manifest["versions"]


def test_a_writer_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: ChunkDatasetWriter) -> None:
        writer.add(IDS[:3], LENGTHS[:1])
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write(tmp_path / "d", fail)
    assert not list(tmp_path.iterdir())
