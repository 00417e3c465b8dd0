"""A fingerprint of a model's weights that no parallel layout and no vocabulary padding changes.

Each entry contributes (its bits) x (an odd number made from its global position) modulo 2^64; contributions add, so
ranks sum their parts. Scores and caches carry the fingerprint of the model that made them.
"""

import hashlib
import json

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.models.placement import VOCABULARY_NAMES, global_indices, global_parameter_name, global_shape

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
