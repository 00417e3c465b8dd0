"""The parts of sequences that context-parallel ranks hold: Megatron-Core's own, and all of them together are all."""

from unittest.mock import Mock

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

from megatron_kd.parallel.groups import in_order, own_part, part_of
from megatron_kd.parallel.mcore_patches import cpu_backend


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_of_all_ranks_in_order_are_the_whole(size):
    whole = torch.arange(12 * size * 2).view(-1, 2)
    parts = [part_of(whole, size, rank) for rank in range(size)]
    assert {len(part) for part in parts} == {12}
    assert in_order(torch.cat(parts), size).equal(whole)
    assert part_of(whole.t(), size, size - 1, dimension=1).equal(parts[-1].t())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_positions_are_those_of_the_rotary_embedding(rank):
    cpu_backend.install()
    positions = torch.arange(24).view(24, 1, 1, 1)
    group = Mock(size=lambda: 3, rank=lambda: rank)
    assert own_part(positions, group).equal(get_pos_emb_on_this_cp_rank(positions, 0, group))


def test_without_a_group_everything_is_own():
    values = torch.arange(6)
    assert own_part(values, None) is values and own_part(values, Mock(size=lambda: 1, rank=lambda: 0)) is values
