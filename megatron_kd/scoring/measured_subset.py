"""The random part of a corpus that both models have scored: what a proxy learns r from, and what it is judged on."""

from dataclasses import dataclass

import numpy as np

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.differences import measured_differences
from megatron_kd.errors import DataError

HELDOUT_SHARE = 0.1
LEAST_SCORED = 20


@dataclass(frozen=True)
class SubsetConfig:
    """``subset.*`` keys."""

    path: str
    teacher_scores: str
    reference_scores: str
    force: bool = False
    """Use a reference model that was trained on chunks of the subset."""


@dataclass(frozen=True)
class MeasuredSubset:
    """r of the scored chunks of a subset, and where they are in the corpus.

    Attributes:
        subset: the dataset.
        chunks: indices in it of the n chunks that have a score.
        values: their r, float32 ``[n]``, nats per token.
        corpus_chunks: their indices in the corpus, int64 ``[n]``; -1 where it does not have one.
        is_heldout: bool ``[n]``, those that are not trained on.
        parents: the two score files, for a manifest.
    """

    subset: ChunkDataset
    chunks: np.ndarray
    values: np.ndarray
    corpus_chunks: np.ndarray
    is_heldout: np.ndarray
    parents: list[dict[str, str]]

    @staticmethod
    def open(config: SubsetConfig, corpus: ChunkDataset, seed: int) -> "MeasuredSubset":
        """Open the subset and its two score files; ``seed`` draws the held-out chunks.

        Raises:
            DataError: corpus, subset and scores do not belong together; the reference model was trained on chunks of
                the subset; too few chunks are scored.
        """
        subset = ChunkDataset.open(config.path)
        if subset.root_fingerprint != corpus.root_fingerprint:
            raise DataError(
                f"{subset.path}: its chunks refer to {subset.root_fingerprint}, those of {corpus.path} to "
                f"{corpus.root_fingerprint}; draw the subset with split_dataset"
            )
        differences = measured_differences(config.teacher_scores, config.reference_scores, subset, config.force)
        values = differences.block(0, subset.num_chunks)
        chunks = np.flatnonzero(~np.isnan(values))
        if len(chunks) < LEAST_SCORED:
            raise DataError(
                f"{subset.path}: {len(chunks)} scored chunks are too few to learn from; draw at least 1% more"
            )
        places = _places(np.asarray(subset.chunk_ids)[chunks], corpus)
        is_heldout = _draw_heldout(len(chunks), seed)
        return MeasuredSubset(subset, chunks, values[chunks], places, is_heldout, differences.parents)

    @property
    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """(chunks, r) to learn from."""
        return self.chunks[~self.is_heldout], self.values[~self.is_heldout]

    @property
    def heldout(self) -> tuple[np.ndarray, np.ndarray]:
        """(chunks, r) to judge by."""
        return self.chunks[self.is_heldout], self.values[self.is_heldout]


def _places(root_ids: np.ndarray, corpus: ChunkDataset) -> np.ndarray:
    """Indices in the corpus of the chunks with these ids in the root, -1 where it lacks one."""
    ids = np.asarray(corpus.chunk_ids)
    places = np.searchsorted(ids, root_ids)
    places[places == len(ids)] = 0
    return np.where(ids[places] == root_ids, places, -1)


def _draw_heldout(count: int, seed: int) -> np.ndarray:
    is_heldout = np.zeros(count, dtype=bool)
    order = np.random.default_rng(seed).permutation(count)
    is_heldout[order[: max(2, int(HELDOUT_SHARE * count))]] = True
    return is_heldout
