"""The order in which training sees chunks: a pure function of (seed, position), whatever the parallel layout.

    position of a sample  →  ChunkOrder  →  chunk index
    step s                →  BatchSchedule  →  positions [s·B, (s + 1)·B), cut into micro-batches for each rank

No permutation is held in memory: an epoch's shuffle is a keyed Feistel network over a·b ≥ num_chunks values, applied
until the value is inside (cycle walking: Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). A run resumes
at a step from its number alone.
"""

import math
from typing import Protocol

import numpy as np

from megatron_kd.data.random_numbers import hash64, hash_int
from megatron_kd.errors import ConfigError

FEISTEL_ROUNDS = 10


class ChunkOrder:
    """Maps sample positions to chunk indices, epoch after epoch.

    Args:
        num_chunks: n; position p belongs to epoch p // n.
        seed: of the shuffle.
        shuffle: use a different permutation in every epoch, instead of the dataset's own order.
    """

    def __init__(self, num_chunks: int, seed: int = 0, shuffle: bool = True) -> None:
        if num_chunks < 1:
            raise ConfigError(f"a dataset of {num_chunks} chunks cannot be trained on; give one that has some")
        self.num_chunks = num_chunks
        self.seed = seed
        self.shuffle = shuffle
        self._left = max(1, math.isqrt(num_chunks - 1) + 1)
        self._right = -(-num_chunks // self._left)

    def chunk_at(self, position: int) -> int:
        """Return the chunk index at one position."""
        return int(self.chunks_at(np.array([position], dtype=np.int64))[0])

    def chunks_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the chunk indices at sample positions ``≥ 0``, int64 of the same shape."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_chunks)
        if not self.shuffle:
            return within
        keys = hash64(hash64(epochs.astype(np.uint64)) ^ np.uint64(hash_int(self.seed)))
        values = self._permute(within.astype(np.uint64), keys)
        while (outside := values >= self.num_chunks).any():
            values[outside] = self._permute(values[outside], keys[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Apply the network once: a bijection of ``[0, left · right)``."""
        a, b = np.uint64(self._left), np.uint64(self._right)
        left: np.ndarray = values // b
        right: np.ndarray = values % b
        for number in range(0, FEISTEL_ROUNDS, 2):
            left = (left + hash64(right ^ hash64(keys + np.uint64(number))) % a) % a
            right = (right + hash64(left ^ hash64(keys + np.uint64(number + 1))) % b) % b
        return left * b + right


class PositionOrder(Protocol):
    """Maps positions to chunks: :class:`ChunkOrder`, or ``BlendedOrder`` over several datasets."""

    def chunks_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the chunk indices at sample positions ``≥ 0``, int64 of the same shape."""
        ...


class BatchSchedule:
    """Cuts the sample order into global batches, and those into micro-batches for each data-parallel rank.

    Args:
        order: position → chunk.
        global_batch_size: B, samples per step over all ranks and micro-batches.
    """

    def __init__(self, order: PositionOrder, global_batch_size: int) -> None:
        self.order = order
        self.global_batch_size = global_batch_size

    def chunks(self, step: int) -> np.ndarray:
        """Return the chunks of the global batch of ``step`` (from 0), int64 ``[B]``; the same for every layout."""
        start = step * self.global_batch_size
        return self.order.chunks_at(np.arange(start, start + self.global_batch_size, dtype=np.int64))

    def micro_batches(self, step: int, rank: int, num_ranks: int, micro_batch_size: int) -> np.ndarray:
        """Return the chunks that one data-parallel rank computes in a step.

        Micro-batch i of rank r is samples ``[(i · num_ranks + r) · b, … + b)`` of the global batch.

        Returns:
            chunk indices int64 ``[micro-batches, b]``.

        Raises:
            ConfigError: B is not a multiple of ``num_ranks · micro_batch_size``.
        """
        if self.global_batch_size % (num_ranks * micro_batch_size):
            raise ConfigError(
                f"training.global_batch_size {self.global_batch_size} is not a multiple of data-parallel size "
                f"{num_ranks} × training.micro_batch_size {micro_batch_size}"
            )
        return self.chunks(step).reshape(-1, num_ranks, micro_batch_size)[:, rank]
