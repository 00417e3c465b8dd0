"""Parameters by global name: this rank's part of each, initial weights, and a fingerprint of all weights.

Names, shapes and indices are those of the unsharded model with the local layer spec; no layout and no layer spec
changes them.

**Initial weights.** Megatron-Core draws each shard from a generator of its own, so that the same seed gives other
weights under another layout. Here every parameter is drawn whole, from a generator seeded by (seed, name), and each
rank keeps its part: runs under any layout start from bit-identical weights.

**Fingerprint.** Each entry contributes (its bits) x (an odd number made from its global position) modulo 2^64.
Contributions add, so ranks sum their parts. Scores and caches carry the fingerprint of the model that made them.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_kd.models.gpt import HiddenStateGPTModel

VOCABULARY_NAMES = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYER_PATTERN = re.compile(r"^decoder\.layers\.(\d+)\.")
_LOCAL_SPEC_NAMES = {  # Transformer Engine's spec: a norm belongs to the linear layer after it
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_STACKED_SECTIONS = {"mlp.linear_fc1.weight": 2}
"""Parameters of several equal sections, one below the other, each of which is sharded by itself: gate and up."""


def global_parameter_name(model: HiddenStateGPTModel, local_name: str) -> str:
    """Return the name that a parameter has in an unsharded model: global layer number, one name for tied weights."""
    match = _LAYER_PATTERN.match(local_name)
    if match:
        layer = cast(TransformerLayer, model.decoder.layers[int(match.group(1))])
        rest = local_name[match.end() :]
        return f"decoder.layers.{layer.layer_number - 1}.{_LOCAL_SPEC_NAMES.get(rest, rest)}"
    if local_name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return local_name


def global_shape(name: str, parameter: Tensor, model: HiddenStateGPTModel) -> tuple[int, ...]:
    """Return the shape of the whole parameter; a vocabulary matrix without padded rows."""
    if name in VOCABULARY_NAMES:
        return (model.valid_vocab_size, parameter.shape[1])
    shape = list(parameter.shape)
    dimension = _sharded_dimension(parameter)
    if dimension is not None:
        shape[dimension] *= model.pg_collection.tp.size()
    return tuple(shape)


def global_indices(name: str, parameter: Tensor, model: HiddenStateGPTModel) -> list[Tensor]:
    """Return, for each dimension of this rank's part, the index of every entry in the whole parameter.

    Padded vocabulary rows have indices at or above the whole matrix's number of rows.
    """
    rank, size = model.pg_collection.tp.rank(), model.pg_collection.tp.size()
    indices = [torch.arange(length) for length in parameter.shape]
    dimension = 0 if name in VOCABULARY_NAMES else _sharded_dimension(parameter)
    if dimension is not None:
        sections = next((count for end, count in _STACKED_SECTIONS.items() if name.endswith(end)), 1)
        length = parameter.shape[dimension] // sections
        own = torch.arange(length) + rank * length
        indices[dimension] = torch.cat([own + number * size * length for number in range(sections)])
    return indices


def take_local_part(whole: Tensor, indices: list[Tensor]) -> Tensor:
    """Return this rank's part of ``whole``; rows beyond its end (vocabulary padding) are zero."""
    rows, rest = indices[0], indices[1:]
    inside = rows < whole.shape[0]
    part = whole.index_select(0, rows[inside])
    for dimension, index in enumerate(rest, start=1):
        if len(index) != whole.shape[dimension]:
            part = part.index_select(dimension, index)
    if bool(inside.all()):
        return part
    padded = part.new_zeros(len(rows), *part.shape[1:])
    padded[inside] = part
    return padded


@torch.no_grad()
def initialize_weights(model: HiddenStateGPTModel, init_std: float, seed: int) -> None:
    """Fill ``model``'s parameters: matrices from N(0, init_std²), biases 0, norms 1; padded vocabulary rows 0."""
    for local_name, parameter in model.named_parameters():
        name = global_parameter_name(model, local_name)
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            whole = _draw(global_shape(name, parameter, model), init_std, seed, name)
            parameter.copy_(take_local_part(whole, global_indices(name, parameter, model)))


def _sharded_dimension(parameter: Tensor) -> int | None:
    """The dimension that tensor-parallel ranks divide; None where each holds the whole parameter."""
    return getattr(parameter, "partition_dim", None) if getattr(parameter, "tensor_model_parallel", False) else None


def _draw(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


_ROW_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
_COLUMN_FACTOR = 0xC2B2AE3D27D4EB4F - (1 << 64)
_BIT_VIEWS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_Sums = dict[str, tuple[int, list[int]]]
"""One rank's weighted sum of each parameter, and the parameter's global shape."""


@torch.no_grad()
def weights_fingerprint(model_chunks: Sequence[HiddenStateGPTModel], group: dist.ProcessGroup) -> str:
    """Return a hexadecimal fingerprint that no layout, layer spec and vocabulary padding changes.

    Collective over ``group``, which is all ranks that hold the model.
    """
    sums: _Sums = {}
    for model in model_chunks:
        for local_name, parameter in model.named_parameters():
            name = global_parameter_name(model, local_name)
            sums[name] = (_weighted_sum(name, parameter, model), list(global_shape(name, parameter, model)))
    gathered: list[_Sums] = [{} for _ in range(group.size())]
    dist.all_gather_object(gathered, sums, group=group)
    return hashlib.sha256(json.dumps(_combine(gathered), sort_keys=True).encode()).hexdigest()[:32]


def _combine(gathered: list[_Sums]) -> dict[str, tuple[int, list[int]]]:
    """Return one number per parameter: distinct shards are summed, the identical sums of replicas count once."""
    shapes: dict[str, list[int]] = {}
    shards: dict[str, set[int]] = {}
    for sums in gathered:
        for name, (value, shape) in sums.items():
            shards.setdefault(name, set()).add(value)
            shapes[name] = shape
    return {name: (sum(values) % (1 << 64), shapes[name]) for name, values in shards.items()}


def _weighted_sum(name: str, parameter: Tensor, model: HiddenStateGPTModel) -> int:
    bits = parameter.detach().cpu().contiguous().view(_BIT_VIEWS[parameter.dtype]).long()
    indices = global_indices(name, parameter, model)
    if name in VOCABULARY_NAMES:  # padded rows do not count, whatever they hold
        bits = bits.masked_fill((indices[0] >= model.valid_vocab_size).unsqueeze(1), 0)
    weights = ((indices[0] + 1) * _ROW_FACTOR) | 1
    if bits.dim() == 1:
        return int((bits * weights).sum()) % (1 << 64)
    columns = ((indices[1] + 1) * _COLUMN_FACTOR) | 1
    return int(((bits * columns).sum(1) * weights).sum()) % (1 << 64)
