"""Process groups of one model, and the positions that context-parallel ranks hold.

Groups are passed explicitly; Megatron-Core's global ``parallel_state`` is never initialised. Two models with different
layouts in one world each get a ``ProcessGroupCollection`` of their own, and a forgotten group fails at once instead of
using the other model's.

Under context parallelism a sequence is cut into 2 C slices; rank r of C holds slices r and 2 C - 1 - r, one after the
other, as Megatron-Core's rotary embedding and Transformer Engine's attention expect. Under a causal mask every rank
then has as much to do.
"""

from datetime import timedelta
from typing import Sequence, cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.parallel.mcore_patches.remedies import ensure_sequence_parallel_workspace

GROUP_DIMENSIONS: dict[str, tuple[str, ...]] = {
    "tp": ("tensor",),
    "pp": ("pipeline",),
    "cp": ("context",),
    "dp": ("data",),
    "mp": ("tensor", "pipeline"),
    "tp_cp": ("tensor", "context"),
    "dp_cp": ("data", "context"),
    "tp_dp_cp": ("tensor", "data", "context"),
    "model": ("tensor", "pipeline", "data", "context"),
}


def create_process_groups(
    layout: ParallelLayout, ranks: Sequence[int] | None = None, timeout: timedelta | None = None
) -> ProcessGroupCollection:
    """Create every group that Megatron-Core needs for a dense decoder, for one model laid out over ``ranks``.

    Collective over the whole world: every rank calls it with the same arguments, whether or not it is in ``ranks``.

    Args:
        layout: sizes of the parallel dimensions.
        ranks: global ranks that hold the model, ``layout.world_size`` of them; None means all.
        timeout: how long a collective in these groups may wait.

    Returns:
        The collection of this rank. On a rank outside ``ranks`` its groups are ``GroupMember.NON_GROUP_MEMBER``.
    """
    members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
    if len(members) != layout.world_size:
        raise ValueError(f"layout {layout.describe()} needs {layout.world_size} ranks, got {len(members)}")
    ensure_sequence_parallel_workspace()
    cache: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    def make(dimensions: Sequence[str]) -> dist.ProcessGroup:
        local = layout.rank_groups(*dimensions)
        key = tuple(tuple(group) for group in local)
        if key not in cache:  # dimensions of size 1 make many collections equal; one group serves them
            cache[key] = _enumerate_groups([[members[i] for i in group] for group in local], timeout)
        return cache[key]

    groups = ProcessGroupCollection()
    for name in ("tp", "pp", "cp", "dp", "mp", "tp_cp", "dp_cp", "tp_dp_cp"):
        setattr(groups, name, make(GROUP_DIMENSIONS[name]))
    groups.intra_dist_opt = make(GROUP_DIMENSIONS["model"])
    groups.inter_dist_opt = None
    groups.intra_dp_cp = groups.dp_cp
    groups.ep = make(())
    groups.expt_tp, groups.tp_ep, groups.tp_ep_pp = groups.tp, groups.tp, groups.mp
    groups.expt_dp = groups.intra_expt_dp = groups.dp_cp
    groups.hcp = None
    groups.pos_embd = None
    groups.embd = _create_embedding_group(layout, members, timeout)
    return groups


def _create_embedding_group(
    layout: ParallelLayout, members: Sequence[int], timeout: timedelta | None
) -> dist.ProcessGroup | None:
    """Group the first and the last stage of each pipeline, which sum the gradients of tied embeddings."""
    ends = [sorted({group[0], group[-1]}) for group in layout.rank_groups("pipeline")]
    group = _enumerate_groups([[members[i] for i in end] for end in ends], timeout)
    return None if group is dist.GroupMember.NON_GROUP_MEMBER else group


def _enumerate_groups(all_ranks: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup:
    mine, _ = dist.new_subgroups_by_enumeration(all_ranks, timeout=timeout)
    return cast(dist.ProcessGroup, dist.GroupMember.NON_GROUP_MEMBER) if mine is None else mine


def is_first_stage(groups: ProcessGroupCollection) -> bool:
    """Return whether this rank holds the embedding's pipeline stage."""
    return groups.pp.rank() == 0


def is_last_stage(groups: ProcessGroupCollection) -> bool:
    """Return whether this rank holds the output layer's pipeline stage."""
    return groups.pp.rank() == groups.pp.size() - 1


def sum_over_group(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum ``values`` over ``group``, in place, and return them."""
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def slice_numbers(size: int, rank: int) -> tuple[int, int]:
    """Return which two of 2 ``size`` slices ``rank`` holds."""
    return rank, 2 * size - 1 - rank


def positions_of_rank(values: Tensor, size: int, rank: int, dimension: int = 0) -> Tensor:
    """Return what rank ``rank`` of ``size`` holds of whole sequences.

    Args:
        values: their positions along ``dimension``, a multiple of 2 ``size`` of them.
    """
    if size == 1:
        return values
    slices = values.chunk(2 * size, dim=dimension)
    return torch.cat([slices[number] for number in slice_numbers(size, rank)], dim=dimension)


def own_positions(values: Tensor, group: dist.ProcessGroup | None, dimension: int = 0) -> Tensor:
    """Return what this rank of a context-parallel group holds of whole sequences; all of it where there is no group."""
    return values if group is None else positions_of_rank(values, group.size(), group.rank(), dimension)


def join_positions(gathered: Tensor, size: int) -> Tensor:
    """Return whole sequences, made from what the ranks hold, one rank after the other along the first dimension."""
    slices = gathered.chunk(2 * size)
    place = {number: 2 * rank + half for rank in range(size) for half, number in enumerate(slice_numbers(size, rank))}
    return torch.cat([slices[place[number]] for number in range(2 * size)])
