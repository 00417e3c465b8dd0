"""Megatron-Core's sharded state of a model's weights, and the errors that its checkpoints raise, in a line."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException


def sharded_weights(chunk: torch.nn.Module, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of one model chunk."""
    # The tied output layer of a pipeline's last stage asks global state, not the groups, which replica it is.
    parallel_state.set_data_parallel_rank(groups.dp_cp.rank())
    try:
        return chunk.sharded_state_dict(metadata=sharding_metadata(groups))
    finally:
        parallel_state.set_data_parallel_rank(None)


def sharding_metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """How optimizer state is laid out on disk: like the parameters, so that any layout can load it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }


def root_cause(error: BaseException) -> str:
    """The text of the error that began it, on one line; of an operating system's error where there is one."""
    chain = [error]
    while (below := _cause(chain[-1])) is not None and below not in chain:
        chain.append(below)
    cause = next((link for link in chain if isinstance(link, OSError)), chain[-1])
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def _cause(error: BaseException) -> BaseException | None:
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error.__cause__ or error.__context__
