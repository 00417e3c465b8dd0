"""Micro-batches of generated text, and the rows of a data-parallel rank."""

from types import SimpleNamespace

import torch

from megatron_kd.training.methods.generated_text import Texts, own_rows
from tests.unit.training.methods.made_batches import (
    micro_batch,
    texts,
)


def test_rows_of_a_data_parallel_rank():
    """Micro-batch i of rank r starts at row (i · ranks + r) · b of the global batch."""
    for rank, expected in ((0, [0, 1, 4, 5]), (1, [2, 3, 6, 7])):
        groups = SimpleNamespace(dp=SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank))
        assert own_rows(texts(8), 2, groups).tokens[:, 0].tolist() == expected


def test_mask_of_a_generated_batch():
    made = micro_batch(
        Texts(
            torch.tensor([[5, 6, 7, 8, 0, 0], [5, 6, 7, 8, 9, 4], [5, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 4]]),
            torch.tensor([4, 6, 2, 6]),
            torch.tensor([2, 5, 1, 6]),
        )
    )
    assert made.loss_mask.tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert made.tokens.tolist()[0] == [5, 6, 7, 0, 0] and made.labels.tolist()[0] == [6, 7, 8, 0, 0]
    there = made.to("meta")
    assert there.payload.texts.tokens.device.type == "meta" and there.key == made.key
