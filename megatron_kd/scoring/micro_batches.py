"""Which chunks share a micro-batch: a function of the dataset's lengths and three numbers, never of the ranks.

    dataset order → units of neighbouring chunks → within a unit, longest first → rows of about one length

A unit is what a rank is given at a time, and what is recomputed after a kill. Its chunks are read from neighbouring
bytes; sorting them makes the rows of a micro-batch nearly equally long, so that little padding is computed.
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.parallel.layout import sequence_multiple

WIDTH_MULTIPLE = 16
MICRO_BATCHES_PER_UNIT = 128
LEAST_MICRO_BATCHES_PER_UNIT = 8  # among fewer neighbours few rows have about one length
LEAST_UNITS = 64


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass: chunk indices int64 ``[rows]``, and the positions per row."""

    indices: np.ndarray
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, positions)."""
        return len(self.indices), self.width


class MicroBatchPlan:
    """The micro-batches of a whole dataset, a unit at a time.

    Args:
        dataset: what is scored.
        micro_batch_size: rows of full length; there are more rows if they are shorter, for as many positions.
        width_multiple: positions per row are rounded up to a multiple of it, at most to ``seq_length``.
        chunks_per_unit: None for 128 micro-batches, or fewer (at least 8) if that made less than 64 units.
    """

    def __init__(
        self,
        dataset: ChunkDataset,
        micro_batch_size: int,
        width_multiple: int = WIDTH_MULTIPLE,
        chunks_per_unit: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._positions = micro_batch_size * dataset.seq_length
        self._multiple = width_multiple
        if chunks_per_unit is None:
            share = dataset.num_chunks // LEAST_UNITS // micro_batch_size
            share = max(LEAST_MICRO_BATCHES_PER_UNIT, min(MICRO_BATCHES_PER_UNIT, share))
            chunks_per_unit = share * micro_batch_size
        self.chunks_per_unit = chunks_per_unit

    @property
    def num_chunks(self) -> int:
        """Chunks of the dataset."""
        return self._dataset.num_chunks

    @property
    def num_units(self) -> int:
        """Units of the dataset."""
        return math.ceil(self._dataset.num_chunks / self.chunks_per_unit)

    def chunk_range(self, unit: int) -> tuple[int, int]:
        """Return the first chunk of a unit, and the one after its last."""
        start = unit * self.chunks_per_unit
        return start, min(start + self.chunks_per_unit, self._dataset.num_chunks)

    def unit(self, unit: int) -> list[MicroBatch]:
        """Return the micro-batches of a unit; each of its chunks is in exactly one."""
        start, stop = self.chunk_range(unit)
        needed = np.maximum(self._dataset.lengths_between(start, stop).astype(np.int64) - 1, 1)
        order = np.argsort(-needed, kind="stable")
        found, first = [], 0
        while first < len(order):
            width = self._width(int(needed[order[first]]))
            rows = order[first : first + max(1, self._positions // width)]
            found.append(MicroBatch(start + rows, width))
            first += len(rows)
        return found

    def _width(self, longest: int) -> int:
        return min(math.ceil(longest / self._multiple) * self._multiple, self._dataset.seq_length)


def width_multiple(tensor_parallel_size: int, sequence_parallel: bool, context_parallel_size: int = 1) -> int:
    """Return what widths are rounded up to: a multiple of 16 that the layout can split."""
    return math.lcm(WIDTH_MULTIPLE, sequence_multiple(tensor_parallel_size, context_parallel_size, sequence_parallel))
