"""The front door to checkpoints: find one of any kind, read its manifest, load weights or model under any layout.

A checkpoint of this project is Megatron-Core's ``torch_dist`` format with a ``manifest.json`` and ``checksums.json``
beside it. A path may name the folder itself, a run folder, or its ``checkpoints/``: the last two mean the newest whole
checkpoint. Hugging Face folders and Megatron-LM's checkpoints are opened in the same way.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.artefacts.manifest import read_manifest
from megatron_kd.checkpoints.hf_folder import HFFolder, is_hf_folder
from megatron_kd.checkpoints.sharded_state import StoredTensors, root_cause, sharded_weights
from megatron_kd.checkpoints.stock_megatron import StockCheckpoint, find_stock_checkpoint
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.tokenization import load_tokenizer
from megatron_kd.errors import CheckpointError, DataError
from megatron_kd.models.architecture import ModelArchitecture, ScoredModelConfig
from megatron_kd.models.gpt import HiddenStateGPTModel, build_model
from megatron_kd.parallel.coordination import on_main_rank
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import Runtime, seed_everything

logger = logging.getLogger(__name__)

CHECKPOINT_KIND = "checkpoint"
LATEST_NAME = "latest"
_WITHOUT_EFFECT_ON_WEIGHTS = ("init_std", "max_position_embeddings", "hf_model_type", "kv_channels")


class WeightSource(Protocol):
    """Weights in files of another format than this project's."""

    def load_into(self, model_chunks: Sequence[HiddenStateGPTModel]) -> None:
        """Fill this rank's model chunks; raises :class:`CheckpointError` where the weights do not fit them."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A whole checkpoint on disk.

    Attributes:
        path: its folder.
        architecture: its model's.
        manifest: what it says of itself; for other formats, the values that this project needs of them.
        checksums: of its files; empty for other formats.
        source: where the weights are; None for a checkpoint of this project.
        is_hf_folder: whether it is a Hugging Face folder.
    """

    path: Path
    architecture: ModelArchitecture
    manifest: Mapping[str, Any]
    checksums: Checksums
    source: WeightSource | None = None
    is_hf_folder: bool = False

    @property
    def tokenizer_hash(self) -> str:
        """Content hash of the tokenizer whose ids the model reads."""
        return self.manifest["tokenizer_hash"]

    def verify(self) -> None:
        """Compare every file with its recorded checksums.

        Raises:
            CheckpointError: a file is missing, truncated or altered; names it.
        """
        try:
            for name in self.checksums.files:
                self.checksums.verify_file(self.path, name)
        except DataError as error:
            raise CheckpointError(f"checkpoint {self.path} is damaged: {error}") from None


def open_checkpoint(path: str | Path) -> CheckpointInfo:
    """Find the checkpoint that ``path`` names and read its manifest.

    Raises:
        CheckpointError: nothing is there, it is not a checkpoint, or its manifest is damaged.
    """
    if is_hf_folder(Path(path)):
        return _open_hf_folder(Path(path))
    stock = find_stock_checkpoint(Path(path))
    if stock is not None:
        return _open_stock_checkpoint(stock)
    folder = _resolve(Path(path))
    try:
        manifest, checksums = read_manifest(folder, CHECKPOINT_KIND)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    fields = {field.name for field in dataclasses.fields(ModelArchitecture)}
    architecture = ModelArchitecture(**{key: value for key, value in manifest["architecture"].items() if key in fields})
    return CheckpointInfo(folder, architecture, manifest, checksums)


def check_same_architecture(info: CheckpointInfo, architecture: ModelArchitecture) -> None:
    """Raise :class:`CheckpointError`, naming the differences, if a checkpoint is not of this architecture.

    Loading alone would not notice fewer layers or another RoPE base.
    """
    names = [field.name for field in dataclasses.fields(architecture) if field.name not in _WITHOUT_EFFECT_ON_WEIGHTS]
    faults = [
        f"{name} {getattr(info.architecture, name)} where {getattr(architecture, name)} is asked for"
        for name in [*names, "head_dim"]
        if getattr(info.architecture, name) != getattr(architecture, name)
    ]
    if faults:
        raise CheckpointError(f"{info.path} is of another model: {', '.join(faults)}")


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Return every ``step_<n>`` in a ``checkpoints/`` folder, newest first. Temporary folders do not match."""
    found = [(int(folder.name[5:]), folder) for folder in checkpoints.glob("step_*") if folder.name[5:].isdigit()]
    return [folder for _, folder in sorted(found, reverse=True)]


def load_weights(
    model_chunks: Sequence[HiddenStateGPTModel], groups: ProcessGroupCollection, info: CheckpointInfo
) -> None:
    """Fill ``model_chunks`` from a checkpoint written under any layout. Collective over the world.

    Raises:
        CheckpointError: the checkpoint is damaged, lacks a parameter, or has another shape of it.
    """
    if info.source is not None:
        info.source.load_into(model_chunks)
        return
    on_main_rank(info.verify)
    state = {f"model{i}": sharded_weights(chunk, groups) for i, chunk in enumerate(model_chunks)}
    loaded = load_sharded_state(state, info.path)
    for i, chunk in enumerate(model_chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)


def load_sharded_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Load a sharded state with ``dist_checkpointing``, with one clear error. Collective over the world.

    Transformer Engine's ``_extra_state`` is loaded only where the checkpoint has it: layer specs differ in it.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    state = without_missing_extra_state(state, StoredTensors(path).object_keys)
    try:
        return dist_checkpointing.load(state, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - a dozen types; the latter is no Exception
        raise CheckpointError(f"checkpoint {path} cannot be loaded into this model: {root_cause(error)}") from error


def without_missing_extra_state(state: dict[str, Any], stored: set[str]) -> dict[str, Any]:
    """Return the sharded state without ``_extra_state`` objects that are not among the stored ones."""
    kept = {}
    for name, entry in state.items():
        if isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state") and entry.unique_key not in stored:
            continue
        is_plain = isinstance(entry, dict) and all(isinstance(key, str) for key in entry)
        kept[name] = without_missing_extra_state(entry, stored) if is_plain else entry
    return kept


@dataclass(frozen=True)
class LoadedModel:
    """Frozen model chunks of this rank, with their groups and the checkpoint that they come from."""

    model_chunks: list[HiddenStateGPTModel]
    groups: ProcessGroupCollection
    layout: ParallelLayout
    info: CheckpointInfo


def load_for_inference(
    config: ScoredModelConfig, parallel: ParallelConfig, dataset: ChunkDataset, runtime: Runtime
) -> LoadedModel:
    """Load a checkpoint for inference on ``dataset``. Collective over the world.

    Raises:
        CheckpointError: it is missing or damaged, or reads other ids than the dataset holds.
    """
    info = open_checkpoint(config.path)
    check_same_tokenizer(info, dataset)
    architecture = info.architecture
    layout = ParallelLayout.for_world(parallel, runtime.world_size)
    layout.check_model(architecture, dataset.seq_length)
    groups = create_process_groups(layout)
    seed_everything(0, groups)  # under sequence parallelism the embedding uses Megatron-Core's generators
    model_chunks = build_model(
        architecture,
        layout,
        groups,
        precision=config.precision or info.manifest["precision"],
        device=runtime.device,
        layer_spec=config.layer_spec,
        max_sequence_length=dataset.seq_length,
    )
    load_weights(model_chunks, groups, info)
    for chunk in model_chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return LoadedModel(model_chunks, groups, layout, info)


def check_same_tokenizer(info: CheckpointInfo, dataset: ChunkDataset) -> None:
    """Raise :class:`CheckpointError` if a model reads other ids than the dataset holds."""
    if info.tokenizer_hash != dataset.tokenizer_hash:
        raise CheckpointError(
            f"{info.path} was trained with tokenizer {info.tokenizer_hash}, but the dataset {dataset.path} has "
            f"{dataset.tokenizer_hash}: use a dataset of the same tokenizer"
        )
    rows = info.architecture.vocab_size
    if rows < dataset.vocab_size:  # a vocabulary-parallel embedding would give zeros for the others
        raise CheckpointError(
            f"{info.path} has embeddings for {rows} ids, but the tokenizer of the dataset {dataset.path} has "
            f"{dataset.vocab_size}: use a model with all of them"
        )


def load_whole_model(path: str | Path) -> tuple[HiddenStateGPTModel, CheckpointInfo]:
    """Load a checkpoint into an unsharded model on the CPU, inside a world of one rank.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    info = open_checkpoint(path)
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    groups = create_process_groups(layout)
    [model] = build_model(
        info.architecture,
        layout,
        groups,
        precision=info.manifest["precision"],
        device=torch.device("cpu"),
        layer_spec="local",
        max_sequence_length=info.manifest["seq_length"],
    )
    load_weights([model], groups, info)
    return model.eval(), info


def _open_stock_checkpoint(path: Path) -> CheckpointInfo:
    stock = StockCheckpoint(path)
    places = [path / "tokenizer", Path(str(getattr(stock.arguments, "tokenizer_model", None) or path / "tokenizer"))]
    folder = next((place for place in places if (place / "tokenizer.json").is_file()), None)
    if folder is None:
        raise CheckpointError(
            f"{path}: a Megatron-LM checkpoint does not hold its tokenizer: put tokenizer.json and "
            f"tokenizer_config.json into {path / 'tokenizer'}"
        )
    tokenizer = load_tokenizer(folder).info
    architecture = dataclasses.replace(
        stock.architecture, vocab_size=min(stock.architecture.vocab_size, tokenizer.vocab_size)
    )
    manifest = {
        "tokenizer_hash": tokenizer.hash,
        "tokenizer_path": str(folder.absolute()),
        "eos_id": tokenizer.eos_id,
        "precision": "bf16" if getattr(stock.arguments, "bf16", False) else "fp32",
        "seq_length": getattr(stock.arguments, "seq_length", architecture.max_position_embeddings),
        "dataset_fingerprint": None,
        "progress": {"step": getattr(stock.arguments, "iteration", None), "tokens": None},
        "config": {},
        "parents": [{"kind": "megatron_lm_checkpoint", "path": str(path.absolute())}],
    }
    return CheckpointInfo(path, architecture, manifest, Checksums(), stock)


def _open_hf_folder(path: Path) -> CheckpointInfo:
    folder = HFFolder(path)
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be compared with the dataset's: {error}") from None
    dtype = folder.config.get("dtype") or folder.config.get("torch_dtype")
    if dtype == "float16":
        logger.info(f"{path}: float16 becomes float32, which holds it exactly")
    manifest = {
        "tokenizer_hash": tokenizer.info.hash,
        "bos_id": folder.bos_id,
        "precision": "bf16" if dtype == "bfloat16" else "fp32",
        "dataset_fingerprint": None,
    }
    return CheckpointInfo(path, folder.architecture, manifest, Checksums(), folder, is_hf_folder=True)


def _resolve(path: Path) -> Path:
    """Return the folder of the checkpoint that a path of this project names."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.name != "checkpoints" and not (path / LATEST_NAME).is_file():
        return path
    folders = checkpoint_folders(path)
    if not folders:
        raise CheckpointError(f"{path}: holds no whole checkpoint (step_<n>)")
    latest = path / LATEST_NAME
    if not latest.is_file():
        return folders[0]
    name = latest.read_text("utf-8", errors="replace").strip()
    named = next((folder for folder in folders if folder.name == name), None)
    if named is None:
        logger.info(f"{latest}: names no checkpoint there ({name[:40]!r}); {folders[0].name} is used")
    return named or folders[0]
