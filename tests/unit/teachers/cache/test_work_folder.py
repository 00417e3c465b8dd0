"""A cache under construction: who may go on with it, and what counts as finished."""

import json

import pytest

from megatron_kd.errors import DataError
from megatron_kd.teachers.cache.cache_writer import Commit, ShardWriter
from megatron_kd.teachers.cache.codec import Codec
from megatron_kd.teachers.cache.work_folder import WorkFolder
from tests.distributed.training.runs import VOCABULARY, make_dataset
from tests.reference.caches import write_cache

SETTINGS = {"dataset": "d", "micro_batch_size": 2}


def test_other_settings_are_named_and_nothing_is_touched(tmp_path):
    first = WorkFolder(tmp_path / "cache", SETTINGS)
    first.claim()
    first.close()
    files = {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()}
    other = WorkFolder(tmp_path / "cache", {**SETTINGS, "micro_batch_size": 4})
    with pytest.raises(DataError, match="made with micro_batch_size 2, now 4: go on with the same settings"):
        other.claim()
    assert {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()} == files
    again = WorkFolder(tmp_path / "cache", SETTINGS)
    other.close()
    again.claim()
    again.close()


def test_two_writers_of_one_output(tmp_path):
    first, second = WorkFolder(tmp_path / "cache", SETTINGS), WorkFolder(tmp_path / "cache", SETTINGS)
    first.claim()
    with pytest.raises(DataError, match="another run is writing this cache"):
        second.claim()
    first.close()
    second.claim()
    second.close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot create it"):
        WorkFolder(tmp_path / "file" / "cache", SETTINGS).claim()


def test_missing_shards_are_not_finished(tmp_path):
    dataset = make_dataset(tmp_path / "data", chunks=10)
    work = WorkFolder(tmp_path / "cache", SETTINGS)
    work.claim()
    writer = ShardWriter(work.path, 0, None, 60)
    writer.commit()
    writer.close()
    with pytest.raises(DataError, match="2 of 2 shards are not whole, the first is knowledge-00000"):
        work.finish(dataset, 2, {"teacher": {"fingerprint": "t"}}, {})
    work.close()
    assert not (tmp_path / "cache").exists()


def test_a_commit_holds_only_while_its_bytes_do(tmp_path):
    cache = write_cache(make_dataset(tmp_path / "data", chunks=10), tmp_path / "whole", Codec("top_k", 4, VOCABULARY))
    (cache.path / "progress").mkdir()
    checksums = cache._checksums
    name = "knowledge-00000.bin"
    checksums.files = {key: value for key, value in checksums.files.items() if key.startswith("knowledge-00000")}
    for complete in (False, True):
        Commit(1, complete, checksums).write(cache.path, 0)
        assert Commit.read(cache.path, 0).chunks == 1
    data = (cache.path / name).read_bytes()
    (cache.path / name).write_bytes(data[:-1])
    assert Commit.read(cache.path, 0) is None
    Commit(1, False, checksums).write(cache.path, 0)
    (cache.path / name).write_bytes(data + b"torn")
    assert Commit.read(cache.path, 0).chunks == 1
    (cache.path / name).write_bytes(b"\x01" + data[1:] if data[0] != 1 else b"\x02" + data[1:])
    assert Commit.read(cache.path, 0) is None and Commit.read(cache.path, 1) is None
    assert json.loads((cache.path / "progress" / "knowledge-00000.json").read_text())["complete"] is False
