"""The proxy of MiniPLM_prx: a small language model with a head of one number, which learns r from scored chunks.

    chunk → decoder → mean of the final hidden states over the positions that count → linear → standardised r

Every rank holds the whole proxy and takes its share of each batch; gradients are summed over the ranks. The paper names
the method and leaves its details open; these are ours (docs/difference_sampling.md).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import sum_over_group
from megatron_kd.selection.prediction_config import ProxyTrainingConfig


class DifferenceProxy(torch.nn.Module):
    """A decoder and a linear head that predicts r.

    Args:
        decoder: a whole model (no tensor or pipeline parallelism).
        mean, std: of r over the training chunks; predictions are in nats per token.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, decoder: HiddenStateGPTModel, mean: float, std: float) -> None:
        super().__init__()
        self.decoder = decoder
        device = next(decoder.parameters()).device
        self.head = torch.nn.Linear(decoder.config.hidden_size, 1, device=device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device=device))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device=device))
        for module in decoder.modules():  # Megatron-Core adds to main_grad there, which only its DDP provides
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = False

    def standardised(self, batch: Batch) -> Tensor:
        """Return (r − mean) / std of each row, fp32 [b]."""
        hidden = self.decoder(batch.tokens, batch.position_ids, None)
        mask = batch.loss_mask.transpose(0, 1).unsqueeze(-1)
        pooled = (hidden.float() * mask).sum(0) / mask.sum(0).clamp_min(1.0)
        return self.head(pooled).squeeze(-1)

    def forward(self, batch: Batch) -> Tensor:
        """Return r of each row, nats per token, fp32 [b]; NaN where no position counts."""
        predicted = self.standardised(batch) * self.std + self.mean
        return torch.where(batch.loss_mask.sum(1) > 0, predicted, torch.nan)


def train_proxy(
    proxy: DifferenceProxy,
    dataset: ChunkDataset,
    chunks: np.ndarray,
    targets: np.ndarray,
    config: ProxyTrainingConfig,
    groups: ProcessGroupCollection,
    device: torch.device,
    on_step: Callable[[float], object] | None = None,
) -> None:
    """Fit the proxy to r by least squares on the standardised value. Collective over ``groups.dp``.

    Args:
        chunks: indices of the training chunks, ``[n]``.
        targets: their r, float32 ``[n]``, none of them NaN.
        on_step: called with the mean squared error of each batch.
    """
    adam = torch.optim.AdamW(proxy.parameters(), lr=config.lr, betas=(0.9, 0.98), eps=1e-6,
                             weight_decay=config.weight_decay)  # fmt: skip
    proxy.train()
    order = _order(len(chunks), config)
    for step in range(config.train_iters):
        rows = order[step * config.batch_size : (step + 1) * config.batch_size]
        mine = rows[groups.dp.rank() :: groups.dp.size()]
        squared = torch.zeros((), device=device)
        if len(mine):
            batch = read_batch(dataset, chunks[mine]).to(device)
            wanted = (torch.from_numpy(targets[mine]).to(device) - proxy.mean) / proxy.std
            squared = (proxy.standardised(batch) - wanted).square().sum()
            (squared / len(rows)).backward()
        _sum_gradients(proxy, groups)
        torch.nn.utils.clip_grad_norm_(proxy.parameters(), config.clip_grad)
        for group in adam.param_groups:
            group["lr"] = config.lr * _schedule(step, config)
        adam.step()
        adam.zero_grad()
        if on_step is not None:
            on_step(float(sum_over_group(squared.detach(), groups.dp)) / len(rows))
    proxy.eval()


@torch.no_grad()
def ranking_quality(
    proxy: DifferenceProxy,
    dataset: ChunkDataset,
    chunks: np.ndarray,
    actual: np.ndarray,
    micro_batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measure how well a proxy ranks unseen chunks: correlations, and the share of the better half that it finds.

    Args:
        chunks: indices of the chunks, ``[n]``.
        actual: their measured r, float32 ``[n]``.
    """
    predicted = np.concatenate([
        proxy(read_batch(dataset, chunks[start : start + micro_batch_size]).to(device)).cpu()
        for start in range(0, len(chunks), micro_batch_size)
    ])  # fmt: skip
    half = len(chunks) // 2
    both = set(np.argsort(-actual, kind="stable")[:half]) & set(np.argsort(-predicted, kind="stable")[:half])
    constant = predicted.std() == 0 or actual.std() == 0
    return {
        "heldout_chunks": len(chunks),
        "pearson": 0.0 if constant else float(np.corrcoef(actual, predicted)[0, 1]),
        "spearman": 0.0 if constant else float(np.corrcoef(_ranks(actual), _ranks(predicted))[0, 1]),
        "better_half_found": len(both) / half,
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


def read_batch(dataset: ChunkDataset, indices: np.ndarray) -> Batch:
    """Read chunks as a batch that is as wide as the longest."""
    longest = max(int(dataset.lengths[index]) for index in indices.tolist())
    return make_batch(dataset, indices, max(1, longest - 1))


def _order(count: int, config: ProxyTrainingConfig) -> np.ndarray:
    """Return the training rows in order: one random permutation after another."""
    needed = config.train_iters * config.batch_size
    generator = np.random.default_rng(config.seed)
    return np.concatenate([generator.permutation(count) for _ in range(math.ceil(needed / count))])[:needed]


def _schedule(step: int, config: ProxyTrainingConfig) -> float:
    """Return the share of the learning rate at a step: a linear warm-up, then a cosine to a tenth."""
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters
    progress = (step - config.warmup_iters) / max(1, config.train_iters - config.warmup_iters)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _sum_gradients(proxy: torch.nn.Module, groups: ProcessGroupCollection) -> None:
    if groups.dp.size() == 1:
        return
    for parameter in proxy.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=groups.dp)
