"""A trained model for use without training (scoring, evaluation), under the layout that the caller's ranks have.

A fingerprint of a model's weights that no parallel layout and no vocabulary padding changes.

Each entry contributes (its bits) x (an odd number made from its global position) modulo 2^64; contributions add, so
ranks sum their parts. Scores and caches carry the fingerprint of the model that made them.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.checkpoints.weights import (
    CheckpointInfo,
    load_weights,
    open_checkpoint,
)
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.models.gpt import HiddenStateGPTModel, build_model
from megatron_kd.models.parameters import VOCABULARY_NAMES, global_indices, global_parameter_name, global_shape
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import Runtime, seed_everything


@dataclass(frozen=True)
class LoadedModel:
    """Frozen model chunks of this rank, with their groups and the checkpoint that they come from."""

    chunks: list[HiddenStateGPTModel]
    groups: ProcessGroupCollection
    layout: ParallelLayout
    info: CheckpointInfo


def load_for_inference(
    config: ScoredModelConfig, parallel: ParallelConfig, dataset: ChunkDataset, runtime: Runtime
) -> LoadedModel:
    """Load a checkpoint for forward passes over ``dataset``. Collective over the world.

    Raises:
        CheckpointError: it is missing or damaged, or reads other ids than the dataset holds.
    """
    info = open_checkpoint(config.path)
    check_same_tokenizer(info, dataset)
    architecture = info.architecture
    layout = ParallelLayout.for_world(parallel, runtime.world_size)
    layout.check_model(
        num_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        ffn_hidden_size=architecture.ffn_hidden_size,
        seq_length=dataset.seq_length,
    )
    groups = create_process_groups(layout)
    seed_everything(0, groups)  # the embedding asks for Megatron-Core's generators under sequence parallelism
    chunks = build_model(
        architecture,
        layout,
        groups,
        precision=config.precision or info.manifest["precision"],
        device=runtime.device,
        layer_spec=config.layer_spec,
        max_sequence_length=dataset.seq_length,
    )
    load_weights(chunks, groups, info)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return LoadedModel(chunks, groups, layout, info)


def check_same_tokenizer(info: CheckpointInfo, dataset: ChunkDataset) -> None:
    """Raise :class:`CheckpointError` if a model reads other ids than the dataset holds."""
    if info.tokenizer_hash != dataset.tokenizer_hash:
        raise CheckpointError(
            f"{info.path} was trained with tokenizer {info.tokenizer_hash}, but the dataset {dataset.path} has "
            f"{dataset.tokenizer_hash}: use a dataset of the same tokenizer"
        )
    rows = info.architecture.vocab_size
    if rows < dataset.vocab_size:  # a vocabulary-parallel embedding would give zeros for the others
        raise CheckpointError(
            f"{info.path} has embeddings for {rows} ids, but the tokenizer of the dataset {dataset.path} has "
            f"{dataset.vocab_size}: use a model with all of them"
        )


_ROW_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
_COLUMN_FACTOR = 0xC2B2AE3D27D4EB4F - (1 << 64)
_BIT_VIEWS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@torch.no_grad()
def weights_fingerprint(chunks: list[torch.nn.Module], group: dist.ProcessGroup) -> str:
    """Hexadecimal fingerprint, the same on every rank of ``group`` (all ranks that hold the model)."""
    sums: dict[str, tuple[int, list[int]]] = {}
    for model in chunks:
        for local_name, parameter in model.named_parameters():
            name = global_parameter_name(model, local_name)
            sums[name] = (_weighted_sum(name, parameter, model), list(global_shape(name, parameter, model)))
    gathered: list[dict] = [None] * group.size()
    dist.all_gather_object(gathered, sums, group=group)
    return hashlib.sha256(json.dumps(_combine(gathered), sort_keys=True).encode()).hexdigest()[:32]


def _combine(gathered: list[dict]) -> dict[str, list]:
    """One number a parameter: distinct shards are summed; identical contributions of replicas count once."""
    combined: dict[str, list] = {}
    shards: dict[str, set[int]] = {}
    for sums in gathered:
        for name, (value, shape) in sums.items():
            shards.setdefault(name, set()).add(value)
            combined[name] = [0, shape]
    for name, values in shards.items():
        combined[name][0] = sum(values) % (1 << 64)
    return combined


def _weighted_sum(name: str, parameter: Tensor, model: torch.nn.Module) -> int:
    bits = parameter.detach().cpu().contiguous().view(_BIT_VIEWS[parameter.dtype]).long()
    indices = global_indices(name, parameter, model)
    if name in VOCABULARY_NAMES:  # padded rows do not count, whatever they hold
        bits = bits.masked_fill((indices[0] >= model.valid_vocab_size).unsqueeze(1), 0)
    weights = ((indices[0] + 1) * _ROW_FACTOR) | 1
    if bits.dim() == 1:
        return int((bits * weights).sum()) % (1 << 64)
    columns = ((indices[1] + 1) * _COLUMN_FACTOR) | 1
    return int(((bits * columns).sum(1) * weights).sum()) % (1 << 64)


def load_whole_model(path: str | Path) -> tuple[HiddenStateGPTModel, CheckpointInfo]:
    """An unsharded model with a checkpoint's weights, inside a world of one rank."""
    info = open_checkpoint(path)
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    groups = create_process_groups(layout)
    chunks = build_model(
        info.architecture,
        layout,
        groups,
        precision=info.manifest["precision"],
        device=torch.device("cpu"),
        layer_spec="local",
        max_sequence_length=info.manifest["seq_length"],
    )
    load_weights(chunks, groups, info)
    return chunks[0].eval(), info
