"""Where this rank's part of a parameter stands in the whole one: names and indices that no layout changes.

Initial weights that depend on the seed and on a parameter's global name, not on who holds it.

Megatron-Core draws each shard from a generator of its own, so the same seed gives other weights under another
layout. Here every parameter is drawn whole, from a generator seeded by (seed, name), and each rank keeps its part:
runs under any tensor x pipeline x data layout start from bit-identical weights.
"""

import hashlib
import re

import torch
from torch import Tensor

LAYER_PATTERN = re.compile(r"^decoder\.layers\.(\d+)\.")
VOCABULARY_NAMES = ("embedding.word_embeddings.weight", "output_layer.weight")


def global_parameter_name(model: torch.nn.Module, local_name: str) -> str:
    """The name that a parameter has in an unsharded model: global layer number, one name for tied weights."""
    match = LAYER_PATTERN.match(local_name)
    if match:
        layer = model.decoder.layers[int(match.group(1))]
        return f"decoder.layers.{layer.layer_number - 1}.{local_name[match.end() :]}"
    if local_name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return local_name


def global_shape(name: str, parameter: Tensor, model: torch.nn.Module) -> tuple[int, ...]:
    """Shape of the whole parameter; a vocabulary matrix without padded rows."""
    if name in VOCABULARY_NAMES:
        return (model.valid_vocab_size, parameter.shape[1])
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= model.pg_collection.tp.size()
    return tuple(shape)


def global_indices(name: str, parameter: Tensor, model: torch.nn.Module) -> list[Tensor]:
    """For each dimension of this rank's part, the index of every entry in the whole parameter.

    Padded vocabulary rows have indices at or above the whole matrix's number of rows.
    """
    rank, size = model.pg_collection.tp.rank(), model.pg_collection.tp.size()
    indices = [torch.arange(length) for length in parameter.shape]
    if name in VOCABULARY_NAMES:
        indices[0] += rank * parameter.shape[0]
    elif getattr(parameter, "tensor_model_parallel", False):
        dimension = parameter.partition_dim
        length = parameter.shape[dimension]
        if name.endswith("mlp.linear_fc1.weight"):  # gate and up projection, each sharded, stacked on every rank
            gate = torch.arange(length // 2) + rank * (length // 2)
            indices[dimension] = torch.cat([gate, gate + size * (length // 2)])
        else:
            indices[dimension] += rank * length
    return indices


def take_local_part(whole: Tensor, indices: list[Tensor]) -> Tensor:
    """This rank's part of ``whole``; rows beyond its end (vocabulary padding) are zero."""
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
def initialize_weights(model: torch.nn.Module, init_std: float, seed: int) -> None:
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


def _draw(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
