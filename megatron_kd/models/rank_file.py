"""One rank's file of a ``torch_dist`` checkpoint: written tensor by tensor, checksummed on the way to the disk.

torch's own writer holds a tensor of every key until the file is closed (the embedding and the output layer of a model
among them), leaves all flushing to the end, and its files have to be read again for their checksums.
"""

import os
from pathlib import Path
from typing import Callable, Iterable

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_kd.data.artefact_folder import start_flush
from megatron_kd.data.checksums import ChecksumStream, FileChecksums

_FLUSH_BYTES = 64 << 20


def write_rank_file(
    path: Path, items: Iterable[WriteItem], planner: SavePlanner, on_bytes: Callable[[int], object] | None = None
) -> tuple[list[WriteResult], FileChecksums]:
    """Write the items of one rank and flush them to the disk; where each is, and the file's checksums.

    Args:
        planner: gives an item's tensor when it is its turn.
        on_bytes: told the size of each tensor as it is written.

    Raises:
        OSError: the file could not be written.
    """
    with _Stream(path) as stream:
        results = []
        for item in sorted(items, key=lambda item: item.type != WriteItemType.BYTE_IO):
            start = stream.size
            _write(stream, planner.resolve_data(item), on_bytes)
            place = _StorageInfo(path.name, start, stream.size - start)
            results.append(WriteResult(item.index, place.length, place))
        return results, stream.finish()


def _write(stream: "_Stream", data: object, on_bytes: Callable[[int], object] | None) -> None:
    if not isinstance(data, torch.Tensor):
        stream.write(data.getbuffer())
        return
    tensor = data.detach().cpu()
    if tensor.untyped_storage().size() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes the whole storage behind a view
    try:
        torch.save(tensor, stream)
    except RuntimeError:
        if stream.error is not None:  # which torch.save does not pass on
            raise stream.error from None
        raise
    if on_bytes is not None:
        on_bytes(tensor.nbytes)


class _Stream:
    """A file to write; its checksums grow with it, and the disk begins with what is there."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")
        self._checksums, self._started = ChecksumStream(), 0
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append."""
        try:
            self._file.write(data)
            self._checksums.update(data)
            self.size += len(data)
            if self.size - self._started >= _FLUSH_BYTES:
                self._file.flush()
                start_flush(self._file.fileno(), self._started, self.size - self._started)
                self._started = self.size
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """torch.save asks for it after every tensor; the file is flushed at its end."""

    def finish(self) -> FileChecksums:
        """Everything is on the disk; the checksums."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._checksums.finish()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError:  # what could not be written was raised by whoever wrote it
            pass
