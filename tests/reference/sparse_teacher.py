"""A teacher whose sparse knowledge is made in memory for every batch: what a cache must agree with."""

from typing import Any, Sequence

import numpy as np
import torch

from megatron_kd.data.batch import Batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.losses import PADDING_ID, SparseKnowledge
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.layout import ParallelConfig
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.teachers.cache.codec import Codec
from megatron_kd.teachers.cache.sparsifier import Sparsifier


class SparseTeacherInMemory:
    """One rank: the model, then the codec's choice, token by token into rows; no file, no chunk index."""

    def __init__(self, model: HiddenStateGPTModel, dataset: ChunkDataset, codec: Codec, sparse_target: str) -> None:
        self._model, self._dataset, self._codec = model, dataset, codec
        self._kind = codec.target_kind(sparse_target, "memory")

    def begin_step(self, batches: Sequence[Batch], *, scheduled: bool = True) -> None:
        """Nothing is prepared."""

    def follow(self, decision: Any) -> None:
        """Nothing to learn."""

    @torch.no_grad()
    def knowledge(self, batch: Batch) -> SparseKnowledge:
        """Every position of the batch, whether it counts or not."""
        hidden = self._model(batch.tokens, batch.position_ids, None)
        length, rows = hidden.shape[:2]
        root_ids = np.tile(self._dataset.root_ids(batch.chunk_indices.numpy()), length)
        positions = np.repeat(np.arange(length), rows)
        sparsifier = Sparsifier(self._codec, self._model.output_head(), None)
        entries = sparsifier(hidden.flatten(0, 1), root_ids, positions)
        record = self._codec.encode(np.ones(length * rows, dtype=bool), entries)
        decoded = self._codec.decode(record, length * rows, len(entries.ids))
        ids = np.full((length * rows, self._codec.max_ids), PADDING_ID, dtype=np.int64)
        weights, tail = np.zeros(ids.shape, np.float32), np.ones(len(ids), np.float32)
        decoded.pad_into(ids, weights, tail)
        return SparseKnowledge(*(torch.from_numpy(array) for array in (ids, weights, tail)), self._kind)


def load_in_memory(path: str, dataset: ChunkDataset, codec: Codec, sparse_target: str, runtime: Runtime) -> Any:
    """The teacher of a run folder, in a world of one rank."""
    from megatron_kd.checkpoints.weights import load_for_inference
    from megatron_kd.models.architecture import ScoredModelConfig

    loaded = load_for_inference(ScoredModelConfig(path), ParallelConfig(), dataset, runtime)
    return SparseTeacherInMemory(loaded.model_chunks[0], dataset, codec, sparse_target)
