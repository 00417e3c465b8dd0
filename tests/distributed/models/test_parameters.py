"""The same seed gives the same weights under every layout, bit for bit, and the fingerprint says so."""

import pytest
import torch

from tests.distributed.models.whole_weights import LAYOUTS, build_here, whole_weights
from tests.distributed.ranks import shared_ranks

CHANGES = [
    ("decoder.layers.3.mlp.linear_fc1.weight", (95, 31)),
    ("embedding.word_embeddings.weight", (299, 0)),
    ("decoder.layers.0.self_attention.linear_proj.weight", (1, 30)),
]


@pytest.fixture(scope="module")
def one_rank():
    """Whole weights and fingerprints of the unsharded model, tied and untied."""
    return {tied: shared_ranks(1).run(build_here, {}, tied) for tied in (True, False)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_do_not_depend_on_the_layout(layout, tied, one_rank):
    answers = shared_ranks(2).run(build_here, LAYOUTS[layout], tied)
    ours, expected = whole_weights(answers), whole_weights(one_rank[tied])
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    assert {answer["fingerprint"] for answer in answers} == {one_rank[tied][0]["fingerprint"]}


@pytest.mark.parametrize("change", CHANGES, ids=[name for name, _ in CHANGES])
@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_one_changed_weight_changes_the_fingerprint_alike(layout, change, one_rank):
    (changed,) = {answer["fingerprint"] for answer in shared_ranks(2).run(build_here, LAYOUTS[layout], True, change)}
    assert changed == shared_ranks(1).run(build_here, {}, True, change)[0]["fingerprint"]
    assert changed != one_rank[True][0]["fingerprint"]
