"""A cache under construction: what can be continued, and what counts as finished."""

import shutil

import pytest

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.errors import DataError
from megatron_kd.teachers.cache.cache_writer import Commit, ShardWriter, UnfinishedCache
from megatron_kd.teachers.cache.codecs import TopKCodec
from tests.distributed.training.runs import VOCABULARY, make_dataset
from tests.reference.caches import write_cache

SETTINGS = {"dataset": "d", "micro_batch_size": 2}


@pytest.fixture
def store(tmp_path):
    with WorkStore(tmp_path / "cache", SETTINGS) as claimed:
        claimed.claim()
        yield claimed


def test_missing_shards_are_not_finished(tmp_path, store):
    dataset = make_dataset(tmp_path / "data", chunks=10)
    writer = ShardWriter(store, 0, None, 60)
    writer.commit()
    writer.close()
    with pytest.raises(DataError, match="2 of 2 shards are not complete, the first is knowledge-00000"):
        UnfinishedCache(store, 2).finish(dataset, {"teacher": {"fingerprint": "t"}}, {})
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("complete", [False, True])
def test_a_commit_holds_only_while_its_bytes_do(tmp_path, complete, store, capsys):
    cache = write_cache(make_dataset(tmp_path / "data", chunks=10), tmp_path / "whole", TopKCodec(4, VOCABULARY))
    checksums = cache._checksums
    checksums.files = {key: value for key, value in checksums.files.items() if key.startswith("knowledge-00000")}
    for name in checksums.files:
        shutil.copy(cache.path / name, store.folder)
    Commit(1, complete, checksums).write(store, 0)
    path = store.folder / "knowledge-00000.bin"
    data = path.read_bytes()

    def is_held(contents):
        path.write_bytes(contents)
        found = UnfinishedCache(store, 2).commits()
        assert found in ({}, {0: found.get(0)})
        said = "knowledge-00000: damaged; the shard is made again" in capsys.readouterr().err
        assert said != (0 in found)
        return 0 in found

    assert is_held(data)
    assert is_held(data + b"torn") == (not complete)
    assert not is_held(data[:-1])
    assert not is_held(bytes([data[0] ^ 1]) + data[1:])


def test_a_damaged_commit_begins_the_shard_anew(store, capsys):
    writer = ShardWriter(store, 0, None, 60)
    writer.commit()
    writer.close()
    assert UnfinishedCache(store, 1).commits()[0].chunks == 0
    path = store.path_of("knowledge-00000")
    path.write_bytes(path.read_bytes()[:-3])
    assert UnfinishedCache(store, 1).commits() == {}
    assert "knowledge-00000.part: damaged part (cut short); it is made again" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["none", "manifest", "missing shard", "other settings"])
def test_a_whole_cache_gets_its_name_and_anything_else_is_continued(tmp_path, damage):
    cache = write_cache(make_dataset(tmp_path / "data", chunks=10), tmp_path / "made", TopKCodec(4, VOCABULARY))
    settings = cache.manifest["producer"]["settings"]
    partial = cache.path.rename(tmp_path / "cache.partial")
    if damage == "manifest":
        (partial / "manifest.json").write_text("{}")
    elif damage == "missing shard":
        (partial / "knowledge-00000.bin").unlink()
    elif damage == "other settings":
        settings = {**settings, "seed": 1}
    with WorkStore(tmp_path / "cache", settings) as store:
        store.claim()
        assert UnfinishedCache(store, 1).publish_if_whole() == (damage == "none")
    assert (tmp_path / "cache" / "manifest.json").is_file() == (damage == "none")
    assert partial.exists() == (damage != "none") and not (partial / "manifest.json").exists()
