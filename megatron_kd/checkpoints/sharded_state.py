"""A checkpoint as a stream of whole mcore tensors, without a model in memory.

A model on torch's meta device says which sharded keys, shapes and offsets its tensors have; only the tensors that are
asked for get memory (Megatron-Core's own load wants every layer of a key at once). This keeps every naming rule in
Megatron-Core, whichever version is installed.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture, Precision
from megatron_kd.models.gpt import build_model
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.mcore_patches.model_patches import replica_of_tied_output_layer


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
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {name: entry.data for name, entry in state.items() if isinstance(entry, kinds)}


def stream_tensors(path: Path, architecture: ModelArchitecture, precision: Precision) -> Iterator[tuple[str, Tensor]]:
    """Every whole tensor of a checkpoint, one after another, in the model's order and precision.

    While one is used, a thread reads the next.

    Raises:
        CheckpointError: the checkpoint is damaged, or lacks tensors of the architecture (lists them).
    """
    stored = StoredTensors(path)
    state = meta_state(architecture, precision)
    entries = {name: state[name] for name in tensors_of(state)}
    stored.require_entries(entries.values())
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(stored.read, entry) for entry in list(entries.values())[:1]]
        for number, (name, entry) in enumerate(entries.items()):
            tensor = ahead.pop().result().to(entry.data.dtype)
            ahead += [pool.submit(stored.read, later) for later in list(entries.values())[number + 1 : number + 2]]
            yield name, tensor
            del tensor  # or it would be held while the next is waited for


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

    def require_entries(self, entries: Iterable[ShardedTensor | ShardedTensorFactory]) -> None:
        """Raise :class:`CheckpointError`, listing the keys, unless the checkpoint has all that the entries need."""
        keys = {self._place(part)[0] for entry in entries for part in _parts(entry)}
        missing = sorted(keys - self._metadata.state_dict_metadata.keys())
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(f"{self._path}: lacks {', '.join(missing[:3])}{more}")

    def object_keys(self) -> set[str]:
        """Keys of everything stored that is not a tensor (``key/shard_0_1``)."""
        kinds = self._metadata.state_dict_metadata.items()
        return {key for key, entry in kinds if isinstance(entry, BytesStorageMetadata)}

    def read_object(self, key: str) -> bytes | None:
        """The bytes of one stored object, the first of its shards; None if there is none."""
        found = sorted(name for name in self.object_keys() if name.split("/")[0] == key)
        if not found:
            return None
        place = self._reader.storage_data[MetadataIndex(found[0])]
        with open(self._path / place.relative_path, "rb") as file:
            return self._reader._slice_file(file, place).read()

    def read(self, entry: ShardedTensor | ShardedTensorFactory) -> Tensor:
        """The tensor of an entry of a sharded state, whole or this rank's part.

        Rows of padding that the checkpoint lacks are zero.

        Raises:
            CheckpointError: the file is damaged, or holds another shape.
        """
        parts = _parts(entry)
        stored = self._metadata.state_dict_metadata
        pieces: list[tuple[int, torch.Size, list[ReadItem]]] = []
        start = 0
        for part in parts:
            key, offsets, sizes = self._place(part)
            chunk = ChunkStorageMetadata(torch.Size(offsets), self._stored_sizes(part, key, offsets, sizes))
            pieces.append((start, torch.Size(sizes), create_read_items_for_chunk_list(key, stored[key], [chunk])))
            start += part.local_shape[0]
        try:
            return self._assembled(entry.data.shape, pieces, stored[self._place(parts[0])[0]].properties.dtype)
        except Exception as error:  # noqa: BLE001 - a damaged file raises anything
            raise CheckpointError(f"{self._path}: '{parts[0].key}' cannot be read ({root_cause(error)})") from None

    def _assembled(
        self, shape: torch.Size, pieces: Sequence[tuple[int, torch.Size, list[ReadItem]]], dtype: torch.dtype
    ) -> Tensor:
        """A tensor from its pieces: first row, stored sizes and what to read of each. One that was stored whole is not
        copied."""
        items = [item for _, _, found in pieces for item in found]
        if len(items) == 1 and items[0].lengths.numel() == shape.numel():
            return self._load(items[0]).reshape(shape)
        whole = torch.zeros(shape, dtype=dtype)
        for start, sizes, found in pieces:
            rows = sizes.numel() // shape[1:].numel()
            target = whole[start : start + rows].view(sizes)
            for item in found:
                narrow_tensor_by_index(target, item.dest_offsets, item.lengths).copy_(self._load(item))
        return whole

    def _load(self, item: ReadItem) -> Tensor:
        """What an item asks for of the tensor that some rank wrote."""
        place = self._reader.storage_data[item.storage_index]
        with open(self._path / place.relative_path, "rb") as file:
            stored = torch.load(self._reader._slice_file(file, place), map_location="cpu", weights_only=True)
        return narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)

    def _place(self, part: ShardedTensor) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Key, offsets and sizes under which a part is stored: layers stacked under one key, or each under its own."""
        sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        if part.prepend_axis_num == 1 and part.key not in self._metadata.state_dict_metadata:
            own = part.key.replace("decoder.layers.", f"decoder.layers.{part.global_offset[0]}.", 1)
            if own in self._metadata.state_dict_metadata:
                return own, tuple(part.global_offset[1:]), tuple(part.local_shape)
        return part.key, tuple(part.global_offset), sizes

    def _stored_sizes(
        self, part: ShardedTensor, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Size:
        stored, wanted = tuple(self._metadata.state_dict_metadata[key].size), tuple(part.global_shape[-len(sizes) :])
        if part.allow_shape_mismatch and stored[1:] == wanted[1:]:  # other vocabulary padding
            return torch.Size((max(0, min(sizes[0], stored[0] - offsets[0])), *sizes[1:]))
        if stored != wanted:
            raise CheckpointError(f"{self._path}: '{key}' has shape {list(stored)}, the architecture {list(wanted)}")
        return torch.Size(sizes)


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


def sharded_weights(chunk: torch.nn.Module, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of one model chunk."""
    with replica_of_tied_output_layer(groups):
        return chunk.sharded_state_dict(metadata=sharding_metadata(groups))


def sharding_metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """How optimizer state is laid out on disk: like the parameters, so that any layout can load it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }


def root_cause(error: BaseException) -> str:
    """The text of the error that began it, on one line; of an operating system's error where there is one."""
    chain = [error]
    while (below := _cause(chain[-1])) is not None and below not in chain:
        chain.append(below)
    cause = next((link for link in chain if isinstance(link, OSError)), chain[-1])
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def _cause(error: BaseException) -> BaseException | None:
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error.__cause__ or error.__context__
