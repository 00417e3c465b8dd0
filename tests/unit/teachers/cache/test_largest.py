"""The blocked search finds what a full sort finds."""

import pytest
import torch

from megatron_kd.teachers.cache.vocabulary_search import BLOCK, NO_LOGIT, blocks_of, largest


@pytest.mark.parametrize("columns", [5, 128, 300, 5_000, 5_001, 16_384, 20_011])
@pytest.mark.parametrize("count", [1, 5, 16, 100])
def test_as_a_full_sort(columns, count):
    if count > columns:
        return
    values = torch.rand(7, columns, generator=torch.Generator().manual_seed(columns))
    values[0, -1] = 2.0
    values[1, 128:140] = 3.0
    expected = values.sort(-1, descending=True)
    blocks = torch.full((7, blocks_of(columns) * BLOCK), NO_LOGIT)
    blocks[:, :columns] = values
    blocks = blocks.unflatten(1, (-1, BLOCK))
    found, ids = largest(blocks, blocks.amax(-1), count)
    assert torch.equal(found, expected.values[:, :count])
    assert torch.equal(values.gather(-1, ids), found)
    assert all(len(set(row)) == count for row in ids.tolist())
