"""Groups in a world of one; with more ranks they are exercised by tests/distributed."""

import pytest
import torch
import torch.distributed as dist

from megatron_kd.parallel.groups import create_process_groups, is_first_stage, is_last_stage, sum_over_group
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
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
