"""The order in which training sees chunks: a pure function of (seed, position), whatever the parallel layout.

    position of a sample  →  ChunkOrder  →  chunk index
    step s                →  BatchSchedule  →  positions [s·B, (s + 1)·B), cut into micro-batches for each rank

No permutation is held in memory: an epoch's shuffle is a keyed Feistel network over a·b ≥ num_chunks values, walked
until it lands inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Resuming at a step needs nothing
but its number.
"""

import math
from typing import Protocol

import numpy as np

from megatron_kd.data.random_numbers import mix64, mix_int
from megatron_kd.errors import ConfigError

FEISTEL_ROUNDS = 10


class ChunkOrder:
    """Sample position → chunk index, epoch after epoch.

    Args:
        num_chunks: n; position p belongs to epoch p // n.
        seed: of the shuffle.
        shuffle: a different permutation in every epoch; without it, the dataset's own order.
    """

    def __init__(self, num_chunks: int, seed: int = 0, shuffle: bool = True) -> None:
        if num_chunks < 1:
            raise ConfigError(f"a dataset of {num_chunks} chunks has nothing to train on")
        self.num_chunks = num_chunks
        self.seed = seed
        self.shuffle = shuffle
        self._left = max(1, math.isqrt(num_chunks - 1) + 1)
        self._right = -(-num_chunks // self._left)

    def chunk_at(self, position: int) -> int:
        """The chunk index of one position."""
        return int(self.chunks_at(np.array([position], dtype=np.int64))[0])

    def chunks_at(self, positions: np.ndarray) -> np.ndarray:
        """Chunk indices int64 of sample positions ``≥ 0``, any shape."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.num_chunks)
        if not self.shuffle:
            return within
        keys = mix64(mix64(epochs.astype(np.uint64)) ^ np.uint64(mix_int(self.seed)))
        values = self._permute(within.astype(np.uint64), keys)
        while (outside := values >= self.num_chunks).any():
            values[outside] = self._permute(values[outside], keys[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass of the network: a bijection of ``[0, left · right)``."""
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = values // b, values % b
        for number in range(0, FEISTEL_ROUNDS, 2):
            left = (left + mix64(right ^ mix64(keys + np.uint64(number))) % a) % a
            right = (right + mix64(left ^ mix64(keys + np.uint64(number + 1))) % b) % b
        return left * b + right


class PositionOrder(Protocol):
    """What gives the chunk of a position: :class:`ChunkOrder`, or ``BlendedOrder`` over several datasets."""

    def chunks_at(self, positions: np.ndarray) -> np.ndarray:
        """Chunk indices int64 of sample positions ``≥ 0``, any shape."""
        ...


class BatchSchedule:
    """Cuts the sample order into global batches and those into micro-batches per data-parallel rank.

    Args:
        order: position → chunk.
        global_batch_size: B, samples per step over all ranks and micro-batches.
    """

    def __init__(self, order: PositionOrder, global_batch_size: int) -> None:
        self.order = order
        self.global_batch_size = global_batch_size

    def chunks(self, step: int) -> np.ndarray:
        """Chunk indices of the global batch of ``step`` (from 0), int64 ``[B]``; the same for every layout."""
        start = step * self.global_batch_size
        return self.order.chunks_at(np.arange(start, start + self.global_batch_size, dtype=np.int64))

    def micro_batches(self, step: int, rank: int, num_ranks: int, micro_batch_size: int) -> np.ndarray:
        """What one data-parallel rank computes in a step.

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
