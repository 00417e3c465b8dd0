"""Expected calibration error of next-token predictions (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    ECE = sum over bins of (predictions in the bin / all) · |their accuracy - their mean confidence|

A prediction's confidence is its largest probability; it is right if that id is the label. Bins are equal intervals of
the confidence, lower end excluded. Collectives per micro-batch: MAX and SUM all-reduces of a few rows over the
tensor-parallel group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.losses.types import OutputHead
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage, own_positions, sum_over_group
from megatron_kd.parallel.schedule import forward_only

BINS = 15
TOKENS_PER_TILE = 1024
"""Tokens whose logits are held at a time."""


@dataclass(frozen=True)
class Calibration:
    """Sums over predictions by bin, float64 ``[bins]`` each: number, summed confidence, number of right ones."""

    counts: Tensor
    confidences: Tensor
    right: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error, between 0 and 1; 0 without predictions."""
        return float((self.right - self.confidences).abs().sum() / self.counts.sum().clamp_min(1))

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float(self.right.sum() / self.counts.sum().clamp_min(1))

    @property
    def confidence(self) -> float:
        """Mean confidence."""
        return float(self.confidences.sum() / self.counts.sum().clamp_min(1))


@torch.no_grad()
def calibration(
    model_chunks: Sequence[HiddenStateGPTModel],
    groups: ProcessGroupCollection,
    dataset: ChunkDataset,
    *,
    device: torch.device,
    micro_batch_size: int,
    bins: int = BINS,
) -> Calibration:
    """Measure the calibration of every unmasked prediction of a dataset.

    Collective over the ranks that hold the model; the result is equal on all of them.
    """
    sums = torch.zeros(3, bins, dtype=torch.float64, device=device)
    starts = range(0, dataset.num_chunks, micro_batch_size)
    for start in starts[groups.dp.rank() :: groups.dp.size()]:
        rows = range(start, min(start + micro_batch_size, dataset.num_chunks))
        batch = make_batch(dataset, np.asarray(rows), dataset.seq_length).to(device)
        found = forward_only(
            model_chunks,
            groups,
            lambda item: (item.tokens, item.position_ids),
            lambda item, hidden: bin_sums(*_predictions(item, hidden, model_chunks[-1], groups), bins),
            [batch],
            seq_length=dataset.seq_length,
            micro_batch_size=len(rows),
        )
        if is_last_stage(groups) and groups.tp.rank() == 0:
            sums += found[0]
    return Calibration(*sum_over_group(sums, groups.intra_dist_opt).cpu())


def bin_sums(confidence: Tensor, right: Tensor, bins: int) -> Tensor:
    """Sum n predictions by bin: float64 ``[3, bins]``, the number, the summed confidence and the number of right ones.

    Args:
        confidence: largest probabilities, ``[n]``.
        right: whether each is the label's, ``[n]``.
    """
    bin_of = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    rows = torch.stack([torch.ones_like(confidence, dtype=torch.float64), confidence.double(), right.double()])
    return torch.zeros(3, bins, dtype=torch.float64, device=rows.device).index_add(1, bin_of, rows)


def _predictions(
    batch: Batch, hidden: Tensor, model: HiddenStateGPTModel, groups: ProcessGroupCollection
) -> tuple[Tensor, Tensor]:
    """Return confidence and rightness, ``[n]`` each, of this rank's unmasked positions."""
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=groups.tp)
    mask, labels = (own_positions(values, groups.cp, 1).t().reshape(-1) for values in (batch.loss_mask, batch.labels))
    mask = mask > 0
    tokens, labels = hidden.flatten(0, 1)[mask], labels[mask]
    parts = [
        _largest(tokens[at : at + TOKENS_PER_TILE], model.output_head(), groups.tp)
        for at in range(0, len(tokens), TOKENS_PER_TILE)
    ]
    if not parts:
        return hidden.new_zeros(0), hidden.new_zeros(0)
    confidence, ids = (torch.cat(values) for values in zip(*parts))
    return confidence, (ids == labels)


def _largest(hidden: Tensor, head: OutputHead, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return each token's largest probability over the whole vocabulary, and its id, ``[tokens]`` each."""
    rows = head.rows_below(head.valid_vocab_size)
    logits = torch.nn.functional.linear(hidden, head.weight[:rows]).float()
    if rows:
        largest, column = logits.max(-1)
    else:
        largest, column = hidden.new_full((len(hidden),), -1e30).float(), torch.zeros(len(hidden), dtype=torch.long)
    whole = largest.clone()
    if group.size() > 1:
        dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
    normaliser = sum_over_group((logits - whole.unsqueeze(1)).exp().sum(-1), group)
    ids = torch.where(largest == whole, column.to(whole.device) + head.vocab_start, -1)
    if group.size() > 1:
        dist.all_reduce(ids, op=dist.ReduceOp.MAX, group=group)
    return 1.0 / normaliser, ids
