"""Weights of a model from a checkpoint or a Hugging Face folder, under any layout; what a checkpoint's manifest says.

A checkpoint is Megatron-Core's ``torch_dist`` format with a ``manifest.json`` and ``checksums.json`` beside it. A path
may name the folder itself, a run folder, or its ``checkpoints/``: the last two mean the newest whole checkpoint.

Megatron-Core's sharded state of a model's weights, and the errors that its checkpoints raise, in a line.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

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
from megatron_kd.data.tokenization import load_tokenizer
from megatron_kd.errors import CheckpointError, DataError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.coordination import on_main_rank

logger = logging.getLogger(__name__)

CHECKPOINT_KIND = "checkpoint"
LATEST_NAME = "latest"
_WITHOUT_EFFECT_ON_WEIGHTS = ("init_std", "max_position_embeddings", "hf_model_type", "kv_channels")


@dataclass(frozen=True)
class CheckpointInfo:
    """A whole checkpoint on disk: where, of what architecture, and its manifest."""

    path: Path
    architecture: ModelArchitecture
    manifest: Mapping[str, Any]
    """Of a Hugging Face folder: what it tells of the same things."""
    checksums: Checksums
    source: HFFolder | StockCheckpoint | None = None
    """Where the weights are, if not in files of our own."""

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
    """Raise :class:`CheckpointError`, naming what differs, if a checkpoint is not of this architecture.

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
    """Every ``step_<n>`` in a ``checkpoints/`` folder, newest first. Temporary folders do not match."""
    found = [(int(folder.name[5:]), folder) for folder in checkpoints.glob("step_*") if folder.name[5:].isdigit()]
    return [folder for _, folder in sorted(found, reverse=True)]


def load_weights(chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection, info: CheckpointInfo) -> None:
    """Fill ``chunks`` from a checkpoint written under any layout. Collective over the world.

    Raises:
        CheckpointError: the checkpoint is damaged, lacks a parameter, or has another shape of it.
    """
    if info.source is not None:
        info.source.load_into(chunks)
        return
    on_main_rank(info.verify)
    state = {f"model{i}": sharded_weights(chunk, groups) for i, chunk in enumerate(chunks)}
    loaded = load_sharded_state(state, info.path)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)


def load_sharded_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """``dist_checkpointing.load`` with its complaints as one clear error. Collective over the world.

    Transformer Engine's ``_extra_state`` is asked for only where the checkpoint has it: the specs differ.
    """
    objects = StoredTensors(path).object_keys()
    state = without_missing_extra_state(state, objects)
    try:
        return dist_checkpointing.load(state, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - a dozen types; the latter is no Exception
        raise CheckpointError(f"checkpoint {path} cannot be loaded into this model: {root_cause(error)}") from error


def without_missing_extra_state(state: dict[str, Any], stored: set[str]) -> dict[str, Any]:
    """The sharded state without ``_extra_state`` objects that are not among the stored ones."""
    kept = {}
    for name, entry in state.items():
        if isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state") and entry.unique_key not in stored:
            continue
        is_plain = isinstance(entry, dict) and all(isinstance(key, str) for key in entry)
        kept[name] = without_missing_extra_state(entry, stored) if is_plain else entry
    return kept


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
    return CheckpointInfo(path, folder.architecture, manifest, Checksums(), folder)


def _resolve(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.name == "checkpoints" or (path / LATEST_NAME).is_file():
        folders = checkpoint_folders(path)
        if not folders:
            raise CheckpointError(f"{path}: holds no whole checkpoint (step_<n>)")
        latest = path / LATEST_NAME
        if not latest.is_file():
            return folders[0]
        name = latest.read_text("utf-8", errors="replace").strip()
        named = next((folder for folder in folders if folder.name == name), None)
        if named is None:
            logger.info(f"{latest}: names no checkpoint there ({name[:40]!r}); {folders[0].name} is taken")
        return named or folders[0]
    return path
