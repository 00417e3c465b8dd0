"""Refuse to judge chunks by a model that was trained on them.

MiniPLM selects from D without D_ref: a reference model that has seen a chunk finds it easier than a model of its size
should, and the difference is wrong. Two datasets share chunks if they are the same, or have one root and an id in
common.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError, UserError

REFERENCE_ROLE = "reference"


def training_datasets(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return ``path`` and ``fingerprint`` of what a model was trained on: every part of a blend; none if unknown.

    Args:
        manifest: of the model's checkpoint.
    """
    data = (manifest.get("config") or {}).get("data") or {}
    if data.get("weights") is not None or len(_paths(data.get("path"))) > 1:
        return [{"path": one["path"], "fingerprint": one["fingerprint"]} for one in manifest["dataset_parents"]]
    fingerprint = manifest.get("dataset_fingerprint")
    return [] if fingerprint is None else [{"path": manifest.get("dataset_path"), "fingerprint": fingerprint}]


def refuse_training_data(manifest: Mapping[str, Any], model_path: Path, dataset: ChunkDataset) -> None:
    """Refuse to score a reference model's own training data.

    A reference model is one whose training data is a reference split (``producer.role`` of the manifest), or a blend
    with one.

    Args:
        manifest: of the model's checkpoint at ``model_path``.
        dataset: what is to be scored.

    Raises:
        DataError: it is a reference model, and ``dataset`` holds chunks of its split.
    """
    for part in training_datasets(manifest):
        split = _open_part(part, dataset)
        if split is None or split.manifest["producer"].get("role") != REFERENCE_ROLE:
            continue
        shared = num_shared_chunks(split, dataset)
        if shared:
            raise DataError(
                f"{dataset.path}: {shared:,} of its {dataset.num_chunks:,} chunks are in {part['path']}, the reference "
                f"split that {model_path} was trained on; score the rest of the corpus, or set force=true"
            )


def refuse_reference_trained_on(model: Mapping[str, Any], dataset: ChunkDataset, reference_scores: Path) -> None:
    """Refuse reference scores whose model was trained on chunks of the dataset to be sampled.

    Args:
        model: the score file's entry about its model.
        dataset: what is to be sampled.
        reference_scores: the score file, for the message.

    Raises:
        DataError: the model was trained on them.
    """
    parts = model.get("trained_on_parts")
    if parts is None:
        known = model.get("trained_on") is not None
        parts = [{"path": model.get("trained_on_path"), "fingerprint": model["trained_on"]}] if known else []
    for part in parts:
        split = _open_part(part, dataset)
        shared = num_shared_chunks(split, dataset) if split is not None else 0
        if part["fingerprint"] == dataset.root_fingerprint:
            shared = dataset.num_chunks
        if shared:
            raise DataError(
                f"{reference_scores}: the reference model was trained on {shared:,} of the {dataset.num_chunks:,} "
                f"chunks of {dataset.path}; train it on a reference split that is not sampled, or set force=true"
            )


def num_shared_chunks(one: ChunkDataset, other: ChunkDataset) -> int:
    """Return how many chunks of ``other`` are chunks of ``one``, by their ids in a common root."""
    if one.fingerprint == other.fingerprint:
        return other.num_chunks
    if one.root_fingerprint != other.root_fingerprint:
        return 0
    if one.is_root:
        return other.num_chunks
    if other.is_root:
        return one.num_chunks
    return int(np.isin(other.chunk_ids, one.chunk_ids).sum())


def open_if_same(path: str | None, fingerprint: str) -> ChunkDataset | None:
    """Return the dataset at ``path`` if it is still there and still the same, else None."""
    try:
        found = ChunkDataset.open(path) if path else None
    except (UserError, OSError):
        return None
    return found if found is not None and found.fingerprint == fingerprint else None


def _open_part(part: Mapping[str, Any], dataset: ChunkDataset) -> ChunkDataset | None:
    if part["fingerprint"] == dataset.fingerprint:
        return dataset
    return open_if_same(part["path"], part["fingerprint"])


def _paths(path: str | Sequence[str] | None) -> Sequence[str | None]:
    return [path] if path is None or isinstance(path, str) else path
