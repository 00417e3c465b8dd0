"""Megatron-Core's models with explicit process groups: pipelines, tied weights, sharding attributes, rotary angles.

Each function is the remedy of an entry of ``patch_table.py``, which says what is wrong and in which versions.
"""

from contextlib import contextmanager
from typing import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

_PARTITION_DIMENSIONS: dict[type, int] = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}


def pipeline_communication(*, is_interleaved: bool) -> dict[str, bool]:
    """Return the ``TransformerConfig`` fields under which a pipeline's point-to-point calls give right results."""
    return {"overlap_p2p_comm": is_interleaved, "batch_p2p_comm": not is_interleaved}


def ensure_sequence_parallel_workspace() -> None:
    """Create the process-wide scratch buffer that linear layers gather sequence-parallel inputs into."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


@contextmanager
def replica_of_tied_output_layer(groups: ProcessGroupCollection) -> Iterator[None]:
    """Let global state answer, inside the block, which data-parallel replica the output layer belongs to."""
    parallel_state.set_data_parallel_rank(groups.dp_cp.rank())
    try:
        yield
    finally:
        parallel_state.set_data_parallel_rank(None)


def use_rotary_kernel(kernel: Callable[[Tensor, Tensor, bool], Tensor]) -> None:
    """Make ``apply_rope_fusion`` call ``kernel(values, angles, interleaved)`` in this process."""
    rope_utils.fused_apply_rotary_pos_emb = kernel


def scale_rotary(
    rotary: RotaryEmbedding, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int
) -> None:
    """Stretch the rotary frequencies as Llama 3.1 does, with the bounds of config.json."""
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq, factor, low_freq_factor, high_freq_factor, original_positions
    )


def mark_sharded_weights(model: torch.nn.Module) -> None:
    """Mark which weights are shards, and along which dimension; gradient norms and placement read it."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        dimension = _PARTITION_DIMENSIONS.get(type(module))
        if dimension is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dimension, 1)
