"""Writing Megatron-Core's ``torch_dist`` format in steps, so that the slow one can run in a thread.

    dist_checkpointing.save(state, folder, sharded_strategy=ShardedSave())   plan: collective, no data moves
    stage()    optional: copies of this rank's tensors, so that training may continue to change them
    write()    this rank's file and its checksums; no communication, any thread
    finish()   collective: ``.metadata``, or why it failed

Megatron-Core's own writer loads everything that a rank writes into memory and, in 0.16, hands it to forked processes
(one that is killed leaves the run waiting for ever). torch's holds a tensor of every key until the file is closed (the
embedding and the output layer among them), leaves all flushing to the end, and its files have to be read again for
their checksums. Here one tensor at a time is resolved, written, checksummed and flushed; conversion from Hugging Face
makes it only then.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_kd.artefacts.artefact_folder import start_flush
from megatron_kd.artefacts.checksums import Checksums, ChecksumStream, FileChecksums

Resolve = Callable[[WriteItem], torch.Tensor]
"""Returns a tensor of the plan, named by ``item.index`` (key and offset), when it is its turn to be written."""
Staging = dict[MetadataIndex, torch.Tensor]
"""Memory for copies, kept from one save to the next: fresh memory costs several times what the copy does."""
_FLUSH_BYTES = 64 << 20


@dataclass(frozen=True)
class _Planned:
    """A save after planning: this rank's part of it, and on rank 0 the metadata of all."""

    planner: "_Planner"
    writer: FileSystemWriter
    path: Path
    plan: SavePlan
    metadata: Metadata | None


class ShardedSave(megatron_torch.TorchDistSaveShardedStrategy):
    """One save of one checkpoint.

    Args:
        resolve: returns the tensors of a state that has only their shapes; None takes them from the state.
        staging: where ``stage`` copies to; filled at first use.
    """

    def __init__(self, resolve: Resolve | None = None, staging: Staging | None = None):
        super().__init__("torch_dist", 1)
        self._given: Resolve | None = resolve
        self._staging: Staging = {} if staging is None else staging
        self._state: _Planned | None = None
        self._results: list[WriteResult] = []
        self._checksums = Checksums()
        self._failure: str | None = "it was never written"

    @property
    def _planned(self) -> _Planned:
        assert self._state is not None, "the save has not been planned"
        return self._state

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Plan who writes what. Megatron-Core calls this; nothing is written yet. Collective over the world."""
        by_key, _, _ = megatron_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        planner, writer = _Planner(self._given), FileSystemWriter(checkpoint_dir, sync_files=True)
        is_main = dist.get_rank() == 0
        planner.set_up_planner(megatron_torch.mcore_to_pyt_state_dict(by_key, False), is_coordinator=is_main)
        writer.set_up_storage_writer(is_main)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        plans: list[Any] | None = [None] * dist.get_world_size() if is_main else None
        dist.gather_object(plan, plans, dst=0)
        metadata = None if plans is None else planner.create_global_plan(plans)[1]
        path = Path(checkpoint_dir) / f"__{dist.get_rank()}_0.distcp"
        self._state = _Planned(planner, writer, path, planner.finish_plan(plan), metadata)

    def stage(self) -> None:
        """Copy this rank's tensors, as they are now, to memory of their own."""
        planner = self._planned.planner
        copies: dict[MetadataIndex, torch.Tensor] = {}
        copied: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        for item in self._planned.plan.items:
            if _is_tensor(item):
                tensor = planner.resolve_data(item).detach()
                place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if place not in copied:  # in fp32 a weight is also the optimizer's: one copy serves both
                    copied[place] = tensor, _copy(tensor, self._staging, item.index)
                copies[item.index] = copied[place][1]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        planner.resolve = lambda item: copies[item.index]

    def write(self, on_bytes: Callable[[int], object] | None = None) -> None:
        """Write this rank's file, flush it to the disk and compute its checksums. Errors are kept for ``finish``."""
        planned = self._planned
        try:
            if planned.plan.items:
                self._results, self._checksums.files[planned.path.name] = write_rank_file(
                    planned.path, planned.plan.items, planned.planner, on_bytes
                )
            self._failure = None
        except BaseException as error:  # noqa: BLE001 - ``finish`` reports it on every rank
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            planned.planner.resolve = None

    def finish(self) -> tuple[str | None, Checksums]:
        """Return why the save failed on some rank, or None, and on rank 0 the checksums of all ranks' files.

        Collective over the world.
        """
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, self._failure)
        failure = next((text for text in failures if text is not None), None)
        if failure is not None:
            return failure, Checksums()
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((self._results, self._checksums.files), gathered, dst=0)
        outcome: list[str | None] = [None]
        checksums = Checksums()
        if gathered is not None:
            assert self._planned.metadata is not None
            try:
                self._planned.writer.finish(self._planned.metadata, [results for results, _ in gathered])
            except OSError as error:
                outcome = [f"{type(error).__name__}: {error}"]
            for _, files in gathered:
                checksums.files.update(files)
        dist.broadcast_object_list(outcome, src=0)
        return outcome[0], checksums


class _Planner(megatron_torch.MCoreSavePlanner):
    """Takes tensors from ``resolve`` where it is set, else from the state."""

    def __init__(self, resolve: Resolve | None):
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
        self.resolve: Resolve | None = resolve

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self.resolve is None or not _is_tensor(write_item):
            return super().resolve_data(write_item)
        return self.resolve(write_item)


def _is_tensor(item: WriteItem) -> bool:
    return item.type != WriteItemType.BYTE_IO


def _copy(tensor: torch.Tensor, staging: Staging, index: MetadataIndex) -> torch.Tensor:
    held = staging.get(index)
    if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
        held = staging[index] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
    return held.copy_(tensor, non_blocking=True)


def write_rank_file(
    path: Path, items: Iterable[WriteItem], planner: SavePlanner, on_bytes: Callable[[int], object] | None = None
) -> tuple[list[WriteResult], FileChecksums]:
    """Write the items of one rank and flush them to the disk.

    Args:
        planner: resolves an item to its tensor when it is its turn.
        on_bytes: is told the size of each tensor as it is written.

    Returns:
        Where each item is, and the file's checksums.

    Raises:
        OSError: the file could not be written.
    """
    with _Stream(path) as stream:
        results = []
        for item in sorted(items, key=_is_tensor):
            start = stream.size
            _write(stream, planner.resolve_data(item), on_bytes)
            place = _StorageInfo(path.name, start, stream.size - start)
            results.append(WriteResult(item.index, place.length, place))
        return results, stream.finish()


def _write(stream: "_Stream", data: Any, on_bytes: Callable[[int], object] | None) -> None:
    if not isinstance(data, torch.Tensor):
        stream.write(data.getbuffer())
        return
    tensor = data.detach().cpu()
    if tensor.untyped_storage().size() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes the whole storage behind a view
    try:
        torch.save(tensor, cast(IO[bytes], stream))
    except RuntimeError:
        if stream.error is not None:  # torch.save replaces it by one of its own
            raise stream.error from None
        raise
    if on_bytes is not None:
        on_bytes(tensor.nbytes)


class _Stream:
    """A file being written, with its checksums; what is there is flushed to the disk along the way."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")
        self._checksums, self._started = ChecksumStream(), 0
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append ``data`` and return its size."""
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
        """Do nothing: torch.save flushes after every tensor, this file at its end."""

    def finish(self) -> FileChecksums:
        """Wait until everything is on the disk, and return the checksums."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._checksums.finish()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError:  # the write that failed has raised already
            pass
