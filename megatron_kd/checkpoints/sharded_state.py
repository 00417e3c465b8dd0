"""Megatron-Core's sharded state of a model, and the tensors that are stored for it, read one by one.

The state says which keys, shapes and offsets a model's tensors have in a ``torch_dist`` checkpoint. A model on torch's
meta device has such a state without data: conversions plan and read a checkpoint with it, and every naming rule stays
in Megatron-Core, whichever version is installed. Only the tensors that are asked for get memory; Megatron-Core's own
load needs every layer of a key at once.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture, Precision
from megatron_kd.models.gpt import HiddenStateGPTModel, build_model
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.mcore_patches.remedies import replica_of_tied_output_layer

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory
"""A tensor in a sharded state; a factory stands for one that is stored in several parts."""


def sharded_weights(chunk: HiddenStateGPTModel, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return Megatron-Core's sharded state dict of one model chunk."""
    with replica_of_tied_output_layer(groups):
        return chunk.sharded_state_dict(metadata=sharding_metadata(groups))


def sharding_metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return the settings under which any layout can load optimizer state: it is laid out like the parameters."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }


def meta_state(architecture: ModelArchitecture, precision: Precision) -> dict[str, Any]:
    """Return the sharded state of an unsharded model without data, by mcore name. Needs a world of one rank."""
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    with torch.device("meta"):
        [model] = build_model(
            architecture,
            layout,
            create_process_groups(layout),
            precision=precision,
            device=torch.device("meta"),
            layer_spec="local",
            max_sequence_length=1,
        )
    return sharded_weights(model, model.pg_collection)


def tensor_entries(state: dict[str, Any]) -> dict[str, Entry]:
    """Return the entries of a sharded state that are tensors, by name."""
    return {name: entry for name, entry in state.items() if isinstance(entry, Entry)}


def meta_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return meta tensors with the shape and dtype of each whole parameter of :func:`meta_state`, by name."""
    return {name: entry.data for name, entry in tensor_entries(state).items() if entry.data is not None}


def stored_parts(entry: Entry) -> list[ShardedTensor]:
    """Return the tensors that are stored for an entry, from the first row to the last."""
    return [entry] if isinstance(entry, ShardedTensor) else list(entry.build())


class PlacedTensors:
    """Finds which part of which mcore tensor an item of a save plan is: for writing a checkpoint without a model."""

    def __init__(self, state: dict[str, Any]):
        self._parts: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
        for name, entry in tensor_entries(state).items():
            start = 0
            for part in stored_parts(entry):
                self._parts[part.key, tuple(part.global_offset)] = (name, start, part.local_shape[0])
                start += part.local_shape[0]

    def find(self, item: WriteItem) -> tuple[str, int, int]:
        """Return the mcore name, the first row and the number of rows of an item."""
        return self._parts[item.index.fqn, tuple(item.index.offset or ())]


class _Piece(NamedTuple):
    """Consecutive rows of a tensor that are stored under one key."""

    first_row: int
    sizes: torch.Size
    items: list[ReadItem]


class StoredTensors:
    """The tensors of one checkpoint on disk, in pieces as some run's ranks wrote them.

    Raises:
        CheckpointError: its ``.metadata`` cannot be read.
    """

    def __init__(self, path: Path):
        self._path, self._reader = path, FileSystemReader(path)
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:  # noqa: BLE001 - unpickling raises anything
            raise CheckpointError(f"{path}: its .metadata cannot be read ({root_cause(error)})") from None
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self.object_keys = {key for key, entry in entries if isinstance(entry, BytesStorageMetadata)}
        """Keys of everything stored that is not a tensor (``key/shard_0_1``)."""

    def require_entries(self, entries: Iterable[Entry]) -> None:
        """Raise :class:`CheckpointError`, listing the keys, unless the checkpoint has all that the entries need."""
        keys = {self._place(part)[0] for entry in entries for part in stored_parts(entry)}
        missing = sorted(keys - self._tensors.keys())
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(f"{self._path}: lacks {', '.join(missing[:3])}{more}")

    def read_object(self, key: str) -> bytes | None:
        """Return the bytes of one stored object, the first of its shards; None if there is none."""
        found = sorted(name for name in self.object_keys if name.split("/")[0] == key)
        if not found:
            return None
        place = self._reader.storage_data[MetadataIndex(found[0])]
        with open(self._path / place.relative_path, "rb") as file:
            return self._reader._slice_file(file, place).read()

    def read(self, entry: Entry) -> Tensor:
        """Return the tensor of an entry of a sharded state, whole or this rank's part.

        Rows of padding that the checkpoint lacks are zero.

        Raises:
            CheckpointError: the file is damaged, or holds another shape.
        """
        parts = stored_parts(entry)
        pieces = []
        first_row = 0
        for part in parts:
            key, offsets, sizes = self._place(part)
            wanted = ChunkStorageMetadata(torch.Size(offsets), self._stored_sizes(part, key, offsets, sizes))
            items = create_read_items_for_chunk_list(key, self._tensors[key], [wanted])
            pieces.append(_Piece(first_row, torch.Size(sizes), items))
            first_row += part.local_shape[0]
        assert entry.data is not None
        try:
            return self._assembled(entry.data.shape, pieces, self._tensors[self._place(parts[0])[0]].properties.dtype)
        except Exception as error:  # noqa: BLE001 - a damaged file raises anything
            raise CheckpointError(f"{self._path}: '{parts[0].key}' cannot be read ({root_cause(error)})") from None

    def _assembled(self, shape: torch.Size, pieces: list[_Piece], dtype: torch.dtype) -> Tensor:
        """Join the pieces of a tensor; one that was stored whole is not copied."""
        items = [item for piece in pieces for item in piece.items]
        if len(items) == 1 and items[0].lengths.numel() == shape.numel():
            return self._load(items[0]).reshape(shape)
        whole = torch.zeros(shape, dtype=dtype)
        for piece in pieces:
            rows = piece.sizes.numel() // shape[1:].numel()
            target = whole[piece.first_row : piece.first_row + rows].view(piece.sizes)
            for item in piece.items:
                narrow_tensor_by_index(target, item.dest_offsets, item.lengths).copy_(self._load(item))
        return whole

    def _load(self, item: ReadItem) -> Tensor:
        """Read what an item needs of the tensor that some rank wrote."""
        place = self._reader.storage_data[item.storage_index]
        with open(self._path / place.relative_path, "rb") as file:
            stored = torch.load(self._reader._slice_file(file, place), map_location="cpu", weights_only=True)
        return narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)

    def _place(self, part: ShardedTensor) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Key, offsets and sizes under which a part is stored: layers stacked under one key, or each under its own."""
        sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        if part.prepend_axis_num == 1 and part.key not in self._tensors:
            own = part.key.replace("decoder.layers.", f"decoder.layers.{part.global_offset[0]}.", 1)
            if own in self._tensors:
                return own, tuple(part.global_offset[1:]), tuple(part.local_shape)
        return part.key, tuple(part.global_offset), sizes

    def _stored_sizes(
        self, part: ShardedTensor, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Size:
        stored, wanted = tuple(self._tensors[key].size), tuple(part.global_shape[-len(sizes) :])
        if part.allow_shape_mismatch and stored[1:] == wanted[1:]:  # other vocabulary padding
            return torch.Size((max(0, min(sizes[0], stored[0] - offsets[0])), *sizes[1:]))
        if stored != wanted:
            raise CheckpointError(f"{self._path}: '{key}' has shape {list(stored)}, the architecture {list(wanted)}")
        return torch.Size(sizes)


def stream_tensors(path: Path, architecture: ModelArchitecture, precision: Precision) -> Iterator[tuple[str, Tensor]]:
    """Yield every whole tensor of a checkpoint by mcore name, in the model's order and precision.

    While one is used, a thread reads the next. Needs a world of one rank.

    Raises:
        CheckpointError: the checkpoint is damaged, or lacks tensors of the architecture (lists them).
    """
    stored = StoredTensors(path)
    entries = tensor_entries(meta_state(architecture, precision))
    stored.require_entries(entries.values())
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(stored.read, entry) for entry in list(entries.values())[:1]]
        for number, (name, entry) in enumerate(entries.items()):
            assert entry.data is not None
            tensor = ahead.pop().result().to(entry.data.dtype)
            ahead += [pool.submit(stored.read, later) for later in list(entries.values())[number + 1 : number + 2]]
            yield name, tensor
            del tensor  # or it would be held while the next is waited for


def root_cause(error: BaseException) -> str:
    """Return the text of the error that started it, on one line; an operating system's error where there is one."""
    chain = [error]
    while (below := _cause(chain[-1])) is not None and below not in chain:
        chain.append(below)
    cause = next((link for link in chain if isinstance(link, OSError)), chain[-1])
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def _cause(error: BaseException) -> BaseException | None:
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error.__cause__ or error.__context__
