"""Negative log-likelihood of every chunk of a dataset under a model: what scoring and held-out evaluation share.

Micro-batch m holds chunks [m·b, (m+1)·b) whatever the layout; data-parallel rank r computes those with m ≡ r. The
fused loss gives the loss of every token without holding logits; a chunk's is their sum over unmasked positions.
"""

import math
from dataclasses import dataclass
from typing import Callable, Sequence

import numpy
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.losses import linear_distillation_loss
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage, sum_over_group
from megatron_kd.parallel.schedule import forward_only

MICRO_BATCHES_PER_SCHEDULE = 8


@dataclass(frozen=True)
class ChunkLosses:
    """Per chunk: summed negative log-likelihood in nats, predicted unmasked tokens, and their UTF-8 bytes."""

    nats: numpy.ndarray
    tokens: numpy.ndarray
    text_bytes: numpy.ndarray


@dataclass(frozen=True)
class HeldoutLoss:
    """Totals over a held-out dataset."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, nats."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Summed nats / ln 2 / UTF-8 bytes of the predicted tokens."""
        return self.nats / math.log(2) / max(1, self.text_bytes)


@torch.no_grad()
def chunk_losses(
    chunks: Sequence[HiddenStateGPTModel],
    groups: ProcessGroupCollection,
    dataset: ChunkDataset,
    *,
    device: torch.device,
    micro_batch_size: int,
    on_chunks: Callable[[int], object] | None = None,
) -> ChunkLosses:
    """Losses of every chunk, equal on all ranks. Collective over the ranks that hold the model.

    Args:
        chunks: the model on this rank (not DDP-wrapped).
        on_chunks: told how many chunks were done, for progress.
    """
    # fp64 columns: nats, tokens, bytes; every rank fills what it computed, one sum at the end merges them.
    table = torch.zeros(dataset.num_chunks, 3, dtype=torch.float64)
    byte_lengths = torch.from_numpy(numpy.asarray(dataset.token_byte_lengths, dtype=numpy.int64))
    count = math.ceil(dataset.num_chunks / micro_batch_size)
    own = range(groups.dp.rank(), count, groups.dp.size())
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    for start in range(0, len(own), MICRO_BATCHES_PER_SCHEDULE):
        batches = [
            _read(dataset, m, micro_batch_size).to(device) for m in own[start : start + MICRO_BATCHES_PER_SCHEDULE]
        ]
        losses = forward_only(
            chunks,
            groups,
            lambda batch: (batch.tokens, batch.position_ids),
            lambda batch, hidden: _token_losses(chunks[-1], groups, batch, hidden),
            batches,
            seq_length=dataset.seq_length,
            micro_batch_size=micro_batch_size,
        )
        if is_last_stage(groups) and groups.tp.rank() == 0:
            for batch, loss in zip(batches, losses):
                _fill(table, batch, loss, byte_lengths, dataset.num_chunks)
        if on_chunks is not None:
            on_chunks(len(batches) * micro_batch_size * groups.dp.size())
    for chunk in chunks:
        chunk.train(was_training)
    table = sum_over_group(table.to(device), groups.intra_dist_opt).cpu().numpy()
    return ChunkLosses(table[:, 0], table[:, 1].astype(numpy.int64), table[:, 2].astype(numpy.int64))


def heldout_loss(
    chunks: Sequence[HiddenStateGPTModel],
    groups: ProcessGroupCollection,
    dataset: ChunkDataset,
    *,
    device: torch.device,
    micro_batch_size: int,
) -> HeldoutLoss:
    """Totals of :func:`chunk_losses`."""
    losses = chunk_losses(chunks, groups, dataset, device=device, micro_batch_size=micro_batch_size)
    return HeldoutLoss(float(losses.nats.sum()), int(losses.tokens.sum()), int(losses.text_bytes.sum()))


def _read(dataset: ChunkDataset, index: int, size: int) -> Batch:
    """Micro-batch ``index``; the last one is filled up with masked copies of the dataset's last chunk."""
    indices = numpy.arange(index * size, (index + 1) * size)
    batch = make_batch(dataset, numpy.minimum(indices, dataset.num_chunks - 1), dataset.seq_length)
    beyond = torch.from_numpy(indices >= dataset.num_chunks)
    batch.loss_mask[beyond] = 0.0
    batch.chunk_indices[beyond] = -1
    return batch


def _token_losses(model: HiddenStateGPTModel, groups: ProcessGroupCollection, batch: Batch, hidden: Tensor) -> Tensor:
    """[b, s] fp32, 0 where masked."""
    result = linear_distillation_loss(
        hidden,
        model.output_head(),
        batch.labels.transpose(0, 1).reshape(-1),
        batch.loss_mask.transpose(0, 1).reshape(-1),
        tp_group=groups.tp,
        sequence_parallel=model.config.sequence_parallel,
    )
    rows, length = batch.tokens.shape
    return result.token_lm_losses.view(length, rows).transpose(0, 1)


def _fill(table: Tensor, batch: Batch, losses: Tensor, byte_lengths: Tensor, num_chunks: int) -> None:
    real = (batch.chunk_indices >= 0).cpu()
    mask = batch.loss_mask > 0
    columns = torch.stack(
        [
            (losses * mask).double().sum(1).cpu(),
            mask.sum(1).double().cpu(),
            (byte_lengths[batch.labels.cpu()] * mask.cpu()).sum(1).double(),
        ],
        dim=1,
    )
    table[batch.chunk_indices.cpu()[real]] = columns[real]
