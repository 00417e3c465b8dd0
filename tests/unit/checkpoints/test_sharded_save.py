"""A rank's file: torch reads it, its checksums are those of its bytes, and it holds one tensor at a time in memory."""

import gc
import io
import weakref

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.checkpoints import sharded_save as rank_file
from megatron_kd.checkpoints.sharded_save import write_rank_file


class Planner:
    """Makes a tensor when it is asked for, and remembers how many of them are alive."""

    def __init__(self):
        self.made, self.most_alive = [], 0

    def resolve_data(self, item):
        if item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(item.index.fqn.encode())
        gc.collect()
        self.most_alive = max(self.most_alive, sum(reference() is not None for reference in self.made))
        tensor = torch.full((3, 1000), float(item.index.fqn))[1:]  # a view: the row before it must not be written
        self.made.append(weakref.ref(tensor))
        return tensor


def items(*names):
    kinds = {True: WriteItemType.SHARD, False: WriteItemType.BYTE_IO}
    return [WriteItem(MetadataIndex(name), kinds[name.isdigit()]) for name in names]


@pytest.mark.parametrize("flush_bytes", [1, 64 << 20])
def test_contents_places_and_checksums(flush_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_file, "_FLUSH_BYTES", flush_bytes)
    planner, path, sizes = Planner(), tmp_path / "__0_0.distcp", []
    results, checksums = write_rank_file(path, items("1", "text", "2", "3"), planner, sizes.append)
    assert [result.index.fqn for result in results] == ["text", "1", "2", "3"] and sizes == [8000] * 3
    data = path.read_bytes()
    for result in results:
        place = result.storage_data
        piece = data[place.offset : place.offset + place.length]
        assert place.relative_path == path.name and result.size_in_bytes == len(piece)
        if result.index.fqn == "text":
            assert piece == b"text"
        else:
            assert torch.equal(torch.load(io.BytesIO(piece)), torch.full((2, 1000), float(result.index.fqn)))
            assert len(piece) < 8000 + 2000
    assert sum(result.size_in_bytes for result in results) == len(data)
    Checksums({path.name: checksums}).verify_file(tmp_path, path.name)
    assert len(planner.made) == 3 and planner.most_alive == 0, "none is held while the next one is made"


def test_a_disk_that_is_full_is_an_os_error(tmp_path, monkeypatch):
    real, calls = rank_file.ChecksumStream.update, []

    def full(self, data):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        real(self, data)

    monkeypatch.setattr(rank_file.ChecksumStream, "update", full)
    with pytest.raises(OSError, match="No space left"):
        write_rank_file(tmp_path / "file", items("1", "2"), Planner())
