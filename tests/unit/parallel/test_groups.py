"""Groups in a world of one (tests/distributed has more), and the positions that context-parallel ranks hold."""

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

from megatron_kd.parallel.groups import (
    create_process_groups,
    is_first_stage,
    is_last_stage,
    join_positions,
    own_positions,
    positions_of_rank,
    sum_over_group,
)
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.mcore_patches import cpu_backend
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import one_rank_groups


def test_every_group_of_one_rank_holds_that_rank():
    with distributed_runtime():
        groups = one_rank_groups()
        for name in (
            "tp",
            "pp",
            "cp",
            "dp",
            "mp",
            "dp_cp",
            "tp_cp",
            "tp_dp_cp",
            "intra_dist_opt",
            "ep",
            "expt_dp",
            "embd",
        ):
            group = getattr(groups, name)
            assert group.size() == 1 and dist.get_process_group_ranks(group) == [0], name
        assert groups.inter_dist_opt is None and groups.pos_embd is None
        assert is_first_stage(groups) and is_last_stage(groups)
        assert sum_over_group(torch.ones(2), groups.tp).tolist() == [1, 1]


def test_equal_dimensions_share_one_group():
    with distributed_runtime():
        groups = one_rank_groups()
        assert groups.tp is groups.pp is groups.dp


def test_a_layout_of_another_size_is_a_programming_error():
    with distributed_runtime():
        two = ParallelLayout.for_world(ParallelConfig(tensor_model_parallel_size=2), 2)
        with pytest.raises(ValueError, match="needs 2 ranks, got 1"):
            create_process_groups(two)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_of_all_ranks_in_order_are_the_whole(size):
    whole = torch.arange(12 * size * 2).view(-1, 2)
    parts = [positions_of_rank(whole, size, rank) for rank in range(size)]
    assert {len(part) for part in parts} == {12}
    assert join_positions(torch.cat(parts), size).equal(whole)
    assert positions_of_rank(whole.t(), size, size - 1, dimension=1).equal(parts[-1].t())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_positions_are_those_of_the_rotary_embedding(rank):
    cpu_backend.install()
    positions = torch.arange(24).view(24, 1, 1, 1)
    group = Mock(size=lambda: 3, rank=lambda: rank)
    assert own_positions(positions, group).equal(get_pos_emb_on_this_cp_rank(positions, 0, group))


def test_without_a_group_everything_is_own():
    values = torch.arange(6)
    assert (
        own_positions(values, None) is values and own_positions(values, Mock(size=lambda: 1, rank=lambda: 0)) is values
    )
