"""Negative log-likelihood of chunks under a model: what scoring and held-out evaluation share.

``micro_batches.py`` decides which chunks share a forward pass. The fused loss gives the loss of every token without
holding logits; a chunk's loss is their sum over unmasked positions.
"""

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Callable, Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.losses.fused_linear import linear_distillation_loss
from megatron_kd.losses.tile_buffers import Workspace
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage, own_positions, sum_over_group
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.scoring.micro_batches import MicroBatch, MicroBatchPlan, width_multiple

CPU_TILE_BYTES = 256 << 20
"""Bytes of logits at a time: without gradients a pass over the weights costs little beside the product."""


@dataclass(frozen=True)
class ChunkLosses:
    """Summed negative log-likelihood of each chunk in nats, its predicted unmasked tokens, and their UTF-8 bytes."""

    nats: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray


@dataclass(frozen=True)
class HeldoutLoss:
    """Totals over a held-out dataset."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, nats."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Summed nats / ln 2 / UTF-8 bytes of the predicted tokens."""
        return self.nats / math.log(2) / max(1, self.text_bytes)


class ChunkScorer:
    """Computes the losses of a unit's chunks on the ranks of one replica of the model.

    Args:
        model_chunks: the model on this rank (not DDP-wrapped), in evaluation mode.
        groups: of the model.
        dataset: what is scored.
        device: of the model.
        tile_bytes: budget of the fused loss; None is ``CPU_TILE_BYTES`` on a CPU, the loss's own default on CUDA.
    """

    def __init__(
        self,
        model_chunks: Sequence[HiddenStateGPTModel],
        groups: ProcessGroupCollection,
        dataset: ChunkDataset,
        device: torch.device,
        tile_bytes: int | None = None,
    ) -> None:
        self._model_chunks, self._groups, self._dataset, self._device = model_chunks, groups, dataset, device
        self._tile_bytes = tile_bytes or (CPU_TILE_BYTES if device.type == "cpu" else None)
        self._workspace = Workspace()
        byte_lengths = np.asarray(dataset.token_byte_lengths, dtype=np.int64)
        self._byte_lengths = torch.from_numpy(byte_lengths).to(device)
        self.has_results = is_last_stage(groups) and groups.tp.rank() == 0
        """Whether :meth:`unit` returns losses on this rank: one of its replica, or under context parallelism each that
        holds a part of the sequences, whose values add up."""

    @torch.no_grad()
    def unit(self, micro_batches: Sequence[MicroBatch]) -> ChunkLosses | None:
        """Return the losses of a unit's chunks in dataset order on the rank that ``has_results``; None on the others.

        Collective over the ranks of a replica.
        """
        columns: list[Tensor] = []
        for (_, width), same_shape in groupby(micro_batches, key=lambda micro_batch: micro_batch.shape):
            columns += self._run(list(same_shape), width)
        if not self.has_results:
            return None
        indices = np.concatenate([micro_batch.indices for micro_batch in micro_batches])
        table = torch.cat(columns).cpu().numpy()[np.argsort(indices, kind="stable")]
        return ChunkLosses(table[:, 0], table[:, 1].astype(np.int64), table[:, 2].astype(np.int64))

    def _run(self, micro_batches: list[MicroBatch], width: int) -> list[Tensor]:
        """Return float64 [rows, 3] of each micro-batch: nats, tokens, bytes."""
        batches = [make_batch(self._dataset, m.indices, width).to(self._device) for m in micro_batches]
        missing = -len(batches) % self._groups.pp.size() if len(self._model_chunks) > 1 else 0
        found = forward_only(
            self._model_chunks,
            self._groups,
            lambda batch: (batch.tokens, batch.position_ids),
            self._columns,
            batches + batches[-1:] * missing,  # an interleaved pipeline takes whole rounds
            seq_length=width,
            micro_batch_size=len(micro_batches[0].indices),
        )
        return found[: len(batches)] if self.has_results else []

    def _columns(self, batch: Batch, hidden: Tensor) -> Tensor:
        model = self._model_chunks[-1]
        labels, weights = (own_positions(values, self._groups.cp, 1) for values in (batch.labels, batch.loss_mask))
        result = linear_distillation_loss(
            hidden,
            model.output_head(),
            labels.transpose(0, 1).reshape(-1),
            weights.transpose(0, 1).reshape(-1),
            tp_group=self._groups.tp,
            sequence_parallel=model.config.sequence_parallel,
            tile_bytes=self._tile_bytes,
            workspace=self._workspace,
        )
        rows, length = labels.shape
        assert result.token_lm_losses is not None  # without gradients they always come
        losses = result.token_lm_losses.view(length, rows).transpose(0, 1)
        mask = weights > 0
        return torch.stack(
            [
                torch.where(mask, losses, 0.0).double().sum(1),
                mask.sum(1).double(),
                (self._byte_lengths[labels] * mask).sum(1).double(),
            ],
            dim=1,
        )


@torch.no_grad()
def chunk_losses(
    model_chunks: Sequence[HiddenStateGPTModel],
    groups: ProcessGroupCollection,
    dataset: ChunkDataset,
    *,
    device: torch.device,
    micro_batch_size: int,
    on_chunks: Callable[[int], object] | None = None,
    tile_bytes: int | None = None,
) -> ChunkLosses:
    """Return the losses of every chunk, equal on all ranks. Collective over the ranks that hold the model.

    Args:
        model_chunks: the model on this rank (not DDP-wrapped).
        on_chunks: called with how many chunks were done, for progress.
        tile_bytes: as :class:`ChunkScorer`'s.
    """
    multiple = width_multiple(groups.tp.size(), model_chunks[0].config.sequence_parallel, groups.cp.size())
    plan = MicroBatchPlan(dataset, micro_batch_size, multiple)
    scorer = ChunkScorer(model_chunks, groups, dataset, device, tile_bytes)
    # float64 columns: nats, tokens, bytes; every rank fills in what it computed, one sum at the end merges them.
    table = torch.zeros(dataset.num_chunks, 3, dtype=torch.float64)
    was_training = model_chunks[0].training
    for model_chunk in model_chunks:
        model_chunk.eval()
    for unit in range(groups.dp.rank(), plan.num_units, groups.dp.size()):
        start, stop = plan.chunk_range(unit)
        losses = scorer.unit(plan.unit(unit))
        if losses is not None:
            columns = np.stack([losses.nats, losses.tokens, losses.text_bytes], axis=1)
            table[start:stop] = torch.from_numpy(columns)
        if on_chunks is not None:
            on_chunks((stop - start) * groups.dp.size())
    for model_chunk in model_chunks:
        model_chunk.train(was_training)
    merged = sum_over_group(table.to(device), groups.intra_dist_opt).cpu().numpy()
    return ChunkLosses(merged[:, 0], merged[:, 1].astype(np.int64), merged[:, 2].astype(np.int64))


def heldout_loss(
    model_chunks: Sequence[HiddenStateGPTModel],
    groups: ProcessGroupCollection,
    dataset: ChunkDataset,
    *,
    device: torch.device,
    micro_batch_size: int,
    tile_bytes: int | None = None,
) -> HeldoutLoss:
    """Return the totals of :func:`chunk_losses`."""
    losses = chunk_losses(
        model_chunks, groups, dataset, device=device, micro_batch_size=micro_batch_size, tile_bytes=tile_bytes
    )
    return HeldoutLoss(float(losses.nats.sum()), int(losses.tokens.sum()), int(losses.text_bytes.sum()))
