"""A checkpoint as a stream of whole mcore tensors, without a model in memory.

A model on torch's meta device says which sharded keys, shapes and offsets its tensors have; only the tensors that are
asked for get memory (Megatron-Core's own load wants every layer of a key at once). This keeps every naming rule in Megatron-Core, whichever version is installed.
"""

from pathlib import Path
from typing import Any, Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import Precision, build_model
from megatron_kd.models.weights import root_cause, sharded_weights
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout


def meta_state(architecture: ModelArchitecture, precision: Precision) -> dict[str, Any]:
    """Megatron-Core's sharded state of an unsharded model without data, by mcore name; in a world of one rank."""
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


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """Name -> meta tensor with the whole parameter's shape and dtype."""
    return {name: entry.data for name, entry in state.items() if isinstance(entry, (ShardedTensor, ShardedTensorFactory))}


def stream_tensors(path: Path, architecture: ModelArchitecture, precision: Precision) -> Iterator[tuple[str, Tensor]]:
    """Every whole tensor of a checkpoint, one after another, in the model's order and precision.

    Raises:
        CheckpointError: the checkpoint is damaged, or lacks tensors of the architecture (lists them).
    """
    stored = StoredTensors(path)
    state = meta_state(architecture, precision)
    entries = {name: state[name] for name in tensors_of(state)}
    stored.require({part.key for entry in entries.values() for part in _parts(entry)})
    for name, entry in entries.items():
        yield name, stored.read(entry).to(entry.data.dtype)


class StoredTensors:
    """The tensors of one checkpoint on disk, in pieces as some run's ranks wrote them.

    Raises:
        CheckpointError: its ``.metadata`` cannot be read.
    """

    def __init__(self, path: Path):
        self._path, self._reader = path, FileSystemReader(path)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # noqa: BLE001 - unpickling raises anything
            raise CheckpointError(f"{path}: its .metadata cannot be read ({root_cause(error)})") from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def require(self, keys: set[str]) -> None:
        """Raise :class:`CheckpointError`, listing the keys, unless the checkpoint has them all."""
        missing = sorted(keys - self._metadata.state_dict_metadata.keys())
        if missing:
            raise CheckpointError(f"{self._path}: lacks {', '.join(missing)}")

    def dtype(self, key: str) -> torch.dtype:
        """Of a stored tensor."""
        return self._metadata.state_dict_metadata[key].properties.dtype

    def read(self, entry: ShardedTensor | ShardedTensorFactory) -> Tensor:
        """The whole tensor of an entry of ``meta_state``; rows of padding that the checkpoint lacks are zero."""
        parts = _parts(entry)
        whole = torch.zeros(entry.data.shape, dtype=self.dtype(parts[0].key))
        targets, items, start = {}, [], 0
        for part in parts:
            sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
            target = whole[start : start + part.local_shape[0]].view(sizes)
            start += part.local_shape[0]
            chunk = ChunkStorageMetadata(torch.Size(part.global_offset), self._stored_sizes(part, sizes))
            found = create_read_items_for_chunk_list(part.key, self._metadata.state_dict_metadata[part.key], [chunk])
            targets |= {item.dest_index: target for item in found}
            items += found
        try:
            self._reader.read_data(LoadPlan(items), _Into(targets))
        except Exception as error:  # noqa: BLE001 - a damaged file raises anything
            raise CheckpointError(f"{self._path}: '{parts[0].key}' cannot be read ({root_cause(error)})") from None
        return whole

    def _stored_sizes(self, part: ShardedTensor, sizes: tuple[int, ...]) -> torch.Size:
        stored = tuple(self._metadata.state_dict_metadata[part.key].size)
        if part.allow_shape_mismatch and stored[1:] == tuple(part.global_shape[1:]):  # other vocabulary padding
            return torch.Size((min(sizes[0], stored[0]), *sizes[1:]))
        if stored != tuple(part.global_shape):
            raise CheckpointError(
                f"{self._path}: '{part.key}' has shape {list(stored)}, the architecture {list(part.global_shape)}"
            )
        return torch.Size(sizes)


class _Into(DefaultLoadPlanner):
    """Reads into given tensors."""

    def __init__(self, targets: dict[MetadataIndex, Tensor]):
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self._targets[read_item.dest_index], read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """What is stored of an entry, from the first row on."""
    return [entry] if isinstance(entry, ShardedTensor) else list(entry.build())


class PlacedTensors:
    """Which part of which mcore tensor an item of a save plan is: for writing a checkpoint without a model."""

    def __init__(self, state: dict[str, Any]):
        self._parts: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
        for name, entry in state.items():
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                start = 0
                for part in _parts(entry):
                    self._parts[part.key, tuple(part.global_offset)] = (name, start, part.local_shape[0])
                    start += part.local_shape[0]

    def find(self, item: WriteItem) -> tuple[str, int, int]:
        """Mcore name, first row and number of rows."""
        return self._parts[item.index.fqn, tuple(item.index.offset)]
