"""Initial weights that depend on the seed and on a parameter's global name, not on who holds it.

Megatron-Core draws each shard from a generator of its own, so the same seed gives other weights under another
layout. Here every parameter is drawn whole, from a generator seeded by (seed, name), and each rank keeps its part:
runs under any tensor x pipeline x data layout start from bit-identical weights.
"""

import hashlib

import torch
from torch import Tensor

from megatron_kd.models.placement import global_indices, global_parameter_name, global_shape, take_local_part


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
