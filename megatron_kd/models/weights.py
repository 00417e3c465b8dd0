"""Weights of a model from a checkpoint or a Hugging Face folder, under any layout; what a checkpoint's manifest says.

A checkpoint is Megatron-Core's ``torch_dist`` format with a ``manifest.json`` and ``checksums.json`` beside it. A path
may name the folder itself, a run folder, or its ``checkpoints/``: the last two mean the newest whole checkpoint.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kd.conversion.hf_folder import HFFolder, is_hf_folder
from megatron_kd.data.checksums import Checksums
from megatron_kd.data.manifest import read_manifest
from megatron_kd.data.tokenization import load_tokenizer
from megatron_kd.errors import CheckpointError, DataError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.agreement import on_main_rank

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
    hf_folder: HFFolder | None = None

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
    if info.hf_folder is not None:
        info.hf_folder.load_into(chunks)
        return
    on_main_rank(info.verify)
    state = {f"model{i}": sharded_weights(chunk, groups) for i, chunk in enumerate(chunks)}
    loaded = load_sharded_state(state, info.path)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)


def sharded_weights(chunk: torch.nn.Module, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of one model chunk."""
    # The tied output layer of a pipeline's last stage asks global state, not the groups, which replica it is.
    parallel_state.set_data_parallel_rank(groups.dp_cp.rank())
    try:
        return chunk.sharded_state_dict(metadata=sharding_metadata(groups))
    finally:
        parallel_state.set_data_parallel_rank(None)


def sharding_metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """How optimizer state is laid out on disk: like the parameters, so that any layout can load it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }


def load_sharded_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """``dist_checkpointing.load`` with its complaints as one clear error. Collective over the world."""
    try:
        return dist_checkpointing.load(state, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - a dozen types; the latter is no Exception
        raise CheckpointError(f"checkpoint {path} cannot be loaded into this model: {root_cause(error)}") from error


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


def _open_hf_folder(path: Path) -> CheckpointInfo:
    folder = HFFolder(path)
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be compared with the dataset's: {error}") from None
    dtype = folder.config.get("dtype") or folder.config.get("torch_dtype")
    manifest = {
        "tokenizer_hash": tokenizer.info.hash,
        "precision": "bf16" if dtype in ("bfloat16", "float16") else "fp32",
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
        latest = path / LATEST_NAME
        if latest.is_file() and (path / latest.read_text().strip()).is_dir():
            return path / latest.read_text().strip()
        if not folders:
            raise CheckpointError(f"{path}: holds no whole checkpoint (step_<n>)")
        return folders[0]
    return path
