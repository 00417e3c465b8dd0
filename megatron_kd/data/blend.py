"""Several chunk datasets as one, mixed by weight; the mix is a pure function of the position.

    position p  →  cycle p // 16,384, slot p % 16,384  →  dataset of that slot, rank among its samples  →  chunk

In every cycle each dataset has its weight's share of the slots, spread evenly. How often a dataset was seen before a
position is arithmetic, so a run resumes at any position without a replay, and no memory grows with the datasets. Each
dataset has an order, and epochs, of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.manifest import recipe_of
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_order import ChunkOrder
from megatron_kd.data.random_numbers import hash_int
from megatron_kd.errors import ConfigError, DataError

CYCLE = 16_384


class BlendedDataset:
    """Several datasets with the interface of a :class:`ChunkDataset`; chunk indices continue from one to the next.

    Args:
        datasets: all with one tokenizer.
        weights: share of the samples from each, on any positive scale.

    Raises:
        DataError: the tokenizers differ, or only some of the datasets leave their prompts out of the loss.
        ConfigError: the weights do not fit.
    """

    def __init__(self, datasets: Sequence[ChunkDataset], weights: Sequence[float]) -> None:
        first = datasets[0]
        self.datasets = list(datasets)
        self.counts = slots_per_cycle(weights, len(datasets))
        for other in self.datasets[1:]:
            if other.tokenizer_hash != first.tokenizer_hash:
                raise DataError(
                    f"{other.path} has tokenizer {other.tokenizer_hash}, {first.path} has {first.tokenizer_hash}: "
                    "tokenise the datasets of a blend with one tokenizer"
                )
        self.masks_prompts = any(dataset.masks_prompts for dataset in self.datasets)
        for other in self.datasets:
            if self.masks_prompts and other.prompt_lengths is not None and not other.masks_prompts:
                raise DataError(
                    f"{other.path}: its prompts count in the loss, those of another dataset of the blend do not; blend "
                    "datasets that treat prompts alike"
                )
        self.path: Path = first.path
        self.tokenizer_hash, self.tokenizer_path = first.tokenizer_hash, first.tokenizer_path
        self.vocab_size, self.eos_id, self.pad_id = first.vocab_size, first.eos_id, first.pad_id
        self.token_byte_lengths = first.token_byte_lengths
        self.seq_length = max(dataset.seq_length for dataset in self.datasets)
        self.num_chunks = sum(dataset.num_chunks for dataset in self.datasets)
        self.num_tokens = sum(dataset.num_tokens for dataset in self.datasets)
        self.starts = np.cumsum([0] + [dataset.num_chunks for dataset in self.datasets])
        parts = [[dataset.fingerprint, count] for dataset, count in zip(self.datasets, self.counts, strict=True)]
        self.fingerprint = recipe_of({"blend": parts})
        self.root_fingerprint = self.fingerprint
        self.manifest: dict[str, Any] = {
            "parents": [
                {"kind": "chunk_dataset", "path": str(dataset.path), "fingerprint": dataset.fingerprint}
                for dataset in self.datasets
            ]
        }

    def __len__(self) -> int:
        return self.num_chunks

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the ids of one chunk, int64 ``[length]``."""
        owner = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.datasets[owner][index - int(self.starts[owner])]

    def gather(self, indices: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return chunks as the rows of a matrix; see :meth:`ChunkDataset.gather`."""
        indices = np.asarray(indices, dtype=np.int64)
        ids = np.full((len(indices), width), self.pad_id, dtype=np.int64)
        lengths = np.zeros(len(indices), dtype=np.int64)
        owners = self._owners(indices)
        for number in np.unique(owners).tolist():
            rows = np.flatnonzero(owners == number)
            ids[rows], lengths[rows] = self.datasets[number].gather(indices[rows] - self.starts[number], width)
        return ids, lengths

    def root_ids(self, indices: np.ndarray) -> np.ndarray:
        """Return the indices themselves: a blend's chunks are identified by their index in it."""
        return np.asarray(indices, dtype=np.int64)

    @property
    def prompt_lengths(self) -> "_BlendedPrompts | None":
        """Ids of each chunk's prompt, as :attr:`ChunkDataset.prompt_lengths`; 0 in a dataset without prompts."""
        return _BlendedPrompts(self) if any(d.prompt_lengths is not None for d in self.datasets) else None

    def order(self, seed: int, shuffle: bool) -> "BlendedOrder":
        """Return the order in which training sees the chunks."""
        return BlendedOrder(self, seed, shuffle)

    def _owners(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, indices, side="right") - 1


class _BlendedPrompts:
    """Prompt lengths of a blend's chunks, looked up on demand."""

    def __init__(self, blend: BlendedDataset) -> None:
        self._blend = blend

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        found = np.zeros(len(indices), dtype=np.int32)
        owners = self._blend._owners(indices)
        for number in np.unique(owners).tolist():
            prompts = self._blend.datasets[number].prompt_lengths
            if prompts is not None:
                rows = owners == number
                found[rows] = prompts[indices[rows] - self._blend.starts[number]]
        return found


class BlendedOrder:
    """Maps sample positions to chunk indices of a blend.

    Args:
        blend: the datasets.
        seed: of each dataset's shuffle.
        shuffle: use permutations, instead of each dataset's own order.
    """

    def __init__(self, blend: BlendedDataset, seed: int = 0, shuffle: bool = True) -> None:
        self.num_chunks = blend.num_chunks
        self._starts = blend.starts
        self._counts = np.array(blend.counts, dtype=np.int64)
        self._orders = [
            ChunkOrder(dataset.num_chunks, hash_int(seed + number) if number else seed, shuffle)
            for number, dataset in enumerate(blend.datasets)
        ]
        self._owner, self._rank = _pattern(blend.counts)

    def chunk_at(self, position: int) -> int:
        """Return the chunk index at one position."""
        return int(self.chunks_at(np.array([position], dtype=np.int64))[0])

    def chunks_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the chunk indices at sample positions ``≥ 0``, int64 of the same shape."""
        positions = np.asarray(positions, dtype=np.int64)
        cycles, slots = np.divmod(positions, CYCLE)
        owners = self._owner[slots]
        own_positions = cycles * self._counts[owners] + self._rank[slots]
        found = np.empty(positions.shape, dtype=np.int64)
        for number, order in enumerate(self._orders):
            mine = owners == number
            found[mine] = order.chunks_at(own_positions[mine]) + self._starts[number]
        return found


def slots_per_cycle(weights: Sequence[float], num_datasets: int) -> list[int]:
    """Return how many of a cycle's slots each dataset has: its share, rounded by largest remainder.

    Raises:
        ConfigError: there is not one positive weight per dataset, or a share is below one slot.
    """
    if len(weights) != num_datasets:
        raise ConfigError(f"data.weights has {len(weights)} values for {num_datasets} datasets in data.path")
    if not all(weight > 0 and np.isfinite(weight) for weight in weights):
        raise ConfigError(f"data.weights must be positive numbers, not {list(weights)}")
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * CYCLE
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: CYCLE - int(counts.sum())]] += 1
    if counts.min() < 1:
        raise ConfigError(
            f"data.weights {list(weights)}: the smallest is below 1/{CYCLE} of all; leave that dataset out"
        )
    return counts.tolist()


def _pattern(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (dataset, rank among its samples) of every slot, ``[CYCLE]`` each: sample k of n is at (k + ½) / n."""
    owners = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ranks + 0.5) / np.asarray(counts)[owners], kind="stable")
    return owners[order], ranks[order]


def open_data(path: str | Sequence[str], weights: Sequence[float] | None = None) -> ChunkDataset | BlendedDataset:
    """Open one dataset, or a blend of several; without weights, in proportion to their chunks.

    Raises:
        DataError: a dataset is missing or damaged, or they cannot be blended.
    """
    paths = [path] if isinstance(path, str) else list(path)
    datasets = [ChunkDataset.open(one) for one in paths]
    if len(datasets) == 1 and weights is None:
        return datasets[0]
    return BlendedDataset(datasets, weights or [float(dataset.num_chunks) for dataset in datasets])
