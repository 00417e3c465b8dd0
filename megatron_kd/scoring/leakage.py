"""Whether a model has been trained on the chunks that it is asked to judge.

MiniPLM selects from D without D_ref: a reference model that has seen a chunk finds it easier than its size says, so its
difference is wrong. Two datasets share chunks if they are the same, or select from one root and have an id in common.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError, UserError

if TYPE_CHECKING:
    from megatron_kd.models.weights import CheckpointInfo

REFERENCE_ROLE = "reference"


def refuse_training_data(info: "CheckpointInfo", dataset: ChunkDataset, force: bool) -> None:
    """Refuse to score a reference model's own training data.

    A model is a reference model if its training data is a reference split (``producer.role`` of the manifest).

    Raises:
        DataError: it is, and ``dataset`` holds chunks of that split.
    """
    path, fingerprint = info.manifest.get("dataset_path"), info.manifest.get("dataset_fingerprint")
    if force or fingerprint is None:
        return
    split = dataset if dataset.fingerprint == fingerprint else open_if_same(path, fingerprint)
    if split is None or split.manifest["producer"].get("role") != REFERENCE_ROLE:
        return
    shared = num_shared_chunks(split, dataset)
    if shared:
        raise DataError(
            f"{dataset.path}: {shared:,} of its {dataset.num_chunks:,} chunks are in {path}, the reference split that "
            f"{info.path} was trained on; score the rest of the corpus, or set force=true"
        )


def refuse_reference_trained_on(
    trained_on: str | None, trained_on_path: str | None, dataset: ChunkDataset, reference_scores: Path
) -> None:
    """Refuse reference scores whose model was trained on chunks of the dataset that is sampled.

    Raises:
        DataError: it was.
    """
    if trained_on is None:
        return
    split = dataset if dataset.fingerprint == trained_on else open_if_same(trained_on_path, trained_on)
    shared = num_shared_chunks(split, dataset) if split is not None else 0
    if trained_on == dataset.root_fingerprint:
        shared = dataset.num_chunks
    if shared:
        raise DataError(
            f"{reference_scores}: the reference model was trained on {shared:,} of the {dataset.num_chunks:,} chunks "
            f"of {dataset.path}; train it on a reference split that is not sampled, or set force=true"
        )


def num_shared_chunks(one: ChunkDataset, other: ChunkDataset) -> int:
    """How many chunks of ``other`` are chunks of ``one``, by their ids in a common root."""
    if one.fingerprint == other.fingerprint:
        return other.num_chunks
    if one.root_fingerprint != other.root_fingerprint:
        return 0
    if one.is_root:
        return other.num_chunks
    if other.is_root:
        return one.num_chunks
    return int(numpy.isin(other.chunk_ids, one.chunk_ids).sum())


def open_if_same(path: str | None, fingerprint: str) -> ChunkDataset | None:
    """The dataset at ``path`` if it is still there and still the same."""
    try:
        found = ChunkDataset.open(path) if path else None
    except (UserError, OSError):
        return None
    return found if found is not None and found.fingerprint == fingerprint else None
