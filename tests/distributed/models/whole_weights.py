"""Models built under a layout on the ranks of a test world: their parts, their fingerprint."""

import dataclasses
from typing import Any

import torch

from megatron_kd.models.gpt import build_model
from megatron_kd.models.parameters import (
    global_indices,
    global_parameter_name,
    global_shape,
    initialize_weights,
    weights_fingerprint,
)
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.mcore_patches import cpu_backend
from tests.reference.one_rank import TINY

ARCHITECTURE = dataclasses.replace(TINY, num_layers=4)
LAYOUTS = {
    "DP2": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


def build_here(keys: dict[str, Any], tied: bool, change: tuple[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """This rank's parts of the initial weights, and the fingerprint after ``change`` (name, index) was doubled."""
    cpu_backend.install()
    world = torch.distributed.get_world_size()
    layout = ParallelLayout.for_world(ParallelConfig(**keys), world)
    groups = create_process_groups(layout)
    architecture = dataclasses.replace(ARCHITECTURE, tie_word_embeddings=tied)
    chunks = build_model(
        architecture, layout, groups, precision="fp32", device=torch.device("cpu"), max_sequence_length=32
    )
    parts = []
    for chunk in chunks:
        initialize_weights(chunk, architecture.init_std, seed=1)
        for local_name, parameter in chunk.named_parameters():
            name = global_parameter_name(chunk, local_name)
            indices = global_indices(name, parameter, chunk)
            parts.append((name, global_shape(name, parameter, chunk), indices, parameter.detach().clone()))
            if change is not None and change[0] == name:
                here = tuple((index == wanted).nonzero() for index, wanted in zip(indices, change[1], strict=True))
                if all(len(found) for found in here):
                    parameter.detach()[tuple(found[0, 0] for found in here)] *= 2
    return {"parts": parts, "fingerprint": weights_fingerprint(chunks, groups.intra_dist_opt)}


def whole_weights(answers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Name -> whole tensor from the parts of all ranks; entries that two ranks hold must agree."""
    whole: dict[str, torch.Tensor] = {}
    for answer in answers:
        for name, shape, indices, part in answer["parts"]:
            tensor = whole.setdefault(name, torch.full(shape, float("nan")))
            if name.endswith("word_embeddings.weight") or name == "output_layer.weight":
                real = indices[0] < shape[0]
                assert not part[~real].any(), "padded rows are 0"
                indices, part = [indices[0][real], indices[1]], part[real]
            place = torch.meshgrid(*indices, indexing="ij")
            held = tensor[place]
            assert torch.equal(held[~held.isnan()], part[~held.isnan()]), name
            tensor[place] = part
    assert all(not tensor.isnan().any() for tensor in whole.values())
    return whole
