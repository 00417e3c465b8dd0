"""A teacher that does not run: its distribution is read from a cache, by the identity of each chunk of a batch.

So every batch size, order, epoch, layout and selection from the cached dataset gets the same knowledge. The records of
a step are decoded in a thread while the student computes.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.data.batch import Batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.losses.types import PADDING_ID, SparseKnowledge, SparseTargetKind
from megatron_kd.parallel.groups import is_last_stage, own_positions
from megatron_kd.teachers.cache.cache_reader import LogitCache, View, token_hash
from megatron_kd.teachers.cache.codec import DecodedChunk
from megatron_kd.teachers.interface import Announced, Teacher
from megatron_kd.teachers.placements import StudentRun
from megatron_kd.teachers.teacher_config import TeacherConfig


def build(config: TeacherConfig, run: StudentRun, groups: ProcessGroupCollection) -> "CachedTeacher":
    """Open the teacher's cache; see :func:`megatron_kd.teachers.placements.build_teacher`."""
    view = View(temperature=run.temperature, compute_dtype=run.precision)
    is_needed = is_last_stage(groups)
    return CachedTeacher.open(str(config.cache_path), run.data, view, run.sparse_target, is_needed, groups.cp)


class CachedTeacher(Teacher):
    """Sparse knowledge about the chunks of one dataset.

    Args:
        cache: covers the dataset.
        dataset: the one that ``Batch.chunk_indices`` refer to.
        kind: the sparse target that is made of the records.
        is_needed: whether this rank computes the loss (the student's last pipeline stage).
        context_group: the student's context-parallel group; knowledge is given about this rank's positions.

    Raises:
        DataError: the cache does not cover the dataset.
    """

    def __init__(
        self,
        cache: LogitCache,
        dataset: ChunkDataset,
        kind: SparseTargetKind,
        is_needed: bool = True,
        context_group: dist.ProcessGroup | None = None,
    ) -> None:
        cache.check_covers(dataset)
        self._cache, self._dataset, self._kind, self._is_needed = cache, dataset, kind, is_needed
        self._context_group = context_group
        self._thread = ThreadPoolExecutor(1, "cache reader")
        self._announced = Announced(())
        self._ahead: deque[Future] = deque()

    @classmethod
    def open(
        cls,
        path: str | Path,
        dataset: ChunkDataset,
        view: View,
        sparse_target: str = "auto",
        is_needed: bool = True,
        context_group: dist.ProcessGroup | None = None,
    ) -> "CachedTeacher":
        """Open a cache for a dataset.

        Args:
            view: how this run sees chunks.
            sparse_target: ``distillation.sparse_target``.

        Raises:
            DataError: the cache is damaged, or was made from another dataset or with another view.
            ConfigError: its codec does not give this sparse target.
        """
        cache = LogitCache.open(path)
        cache.view.check(view, str(path))
        kind = cache.codec.target_kind(sparse_target, str(path))
        return cls(cache, dataset, kind, is_needed, context_group)

    def begin_step(self, batches: Sequence[Batch], *, scheduled: bool = True) -> None:
        """Start to decode the records of a step."""
        if self._is_needed:
            self._announced = Announced(batches)
            self._ahead = deque(self._thread.submit(self._read, batch) for batch in batches)

    def knowledge(self, batch: Batch) -> SparseKnowledge | None:
        """Return ids and weights [tokens, K] of this rank's positions in sequence-major order; None where not needed.

        Raises:
            DataError: a chunk's ids are not those that were cached, or its record is damaged.
        """
        if not self._is_needed:
            return None
        self._announced.take(batch)
        ids, weights, tail = self._ahead.popleft().result()
        device = batch.tokens.device
        return SparseKnowledge(
            ids=ids.to(device, non_blocking=True),
            weights=weights.to(device, non_blocking=True),
            tail_mass=tail.to(device, non_blocking=True),
            kind=self._kind,
            vocab_size=self._cache.codec.vocab_size,
        )

    def _read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids, weights [tokens, K] and tail mass [tokens] of a micro-batch."""
        batch = batch.to("cpu")
        rows, length = batch.tokens.shape
        chunks = [self._chunk(batch, row) for row in range(rows)]
        width = max((int(chunk.counts.max()) for chunk in chunks if chunk is not None and len(chunk.counts)), default=1)
        ids = np.full((length, rows, width), PADDING_ID, dtype=np.int64)
        weights = np.zeros((length, rows, width), dtype=np.float32)
        tail = np.ones((length, rows), dtype=np.float32)
        for row, chunk in enumerate(chunks):
            if chunk is not None:
                chunk.pad_into(ids[:, row], weights[:, row], tail[:, row])
        return self._own_tokens(ids), self._own_tokens(weights), self._own_tokens(tail)

    def _own_tokens(self, values: np.ndarray) -> torch.Tensor:
        """Return this rank's positions of values [s, b, ...] in sequence-major order."""
        return own_positions(torch.from_numpy(values), self._context_group).flatten(0, 1)

    def _chunk(self, batch: Batch, row: int) -> DecodedChunk | None:
        """Decode the record of one row and compare its ids; None for a row without a chunk."""
        chunk = int(batch.chunk_indices[row])
        if chunk < 0:
            return None
        record = int(self._cache.rows(self._dataset.root_ids(np.array([chunk])))[0])
        entry = self._cache.index(record)
        positions, expected = int(entry["positions"]), int(entry["token_hash"])
        if positions == 0:
            return None
        inside = positions <= batch.tokens.shape[1]
        found = token_hash(batch.tokens[row], batch.labels[row], positions) if inside else None
        if found != expected or bool(batch.loss_mask[row, positions:].any()):
            raise DataError(
                f"chunk {chunk} of {self._dataset.path} has other ids than when {self._cache.path} was made "
                f"(hash {'of a longer chunk' if found is None else f'{found:016x}'} where {expected:016x} was cached): "
                "the dataset was changed, cache the teacher again"
            )
        decoded = self._cache.read(record)
        if not np.isin(np.flatnonzero(batch.loss_mask[row].numpy()), decoded.rows).all():
            raise DataError(
                f"{self._cache.path}: lacks positions of chunk {chunk} that count in this run's loss: cache the "
                "teacher on this dataset"
            )
        return decoded
