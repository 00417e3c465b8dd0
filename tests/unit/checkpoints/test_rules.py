"""The rule types, row by row, and the table that applies them."""

import pytest
import torch

from megatron_kd.checkpoints.rules import MergeGateUp, MergeQKV, Rename, TensorTable, Vocabulary
from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture

# 6 heads in 2 groups of 3, head width 4.
ARCHITECTURE = ModelArchitecture(2, 24, 20, num_attention_heads=6, num_query_groups=2, vocab_size=11)


def test_qkv_rows_are_interleaved_by_query_group() -> None:
    q = torch.arange(24).float()
    k = torch.arange(100, 108).float()
    v = torch.arange(200, 208).float()
    merged = MergeQKV("m", ("q", "k", "v")).to_mcore([q, k, v], ARCHITECTURE, 0)
    # Group 0: heads 0, 1, 2, its key and its value; then group 1.
    expected = [*range(0, 12), *range(100, 104), *range(200, 204), *range(12, 24), *range(104, 108), *range(204, 208)]
    assert merged.tolist() == expected


def test_gate_stands_above_up() -> None:
    gate, up = torch.zeros(3, 2), torch.ones(3, 2)
    assert MergeGateUp("m", ("gate", "up")).to_mcore([gate, up], ARCHITECTURE, 0)[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("trailing", [(), (5,)])
def test_qkv_round_trip(trailing: tuple[int, ...]) -> None:
    rule = MergeQKV("m", ("q", "k", "v"))
    parts = [torch.randn(rows, *trailing) for rows in (24, 8, 8)]
    for again, part in zip(rule.to_hf(rule.to_mcore(parts, ARCHITECTURE, 0), ARCHITECTURE), parts, strict=True):
        assert torch.equal(again, part)


def test_vocabulary_is_padded_with_zeros_and_cut() -> None:
    rule = Vocabulary("m", ("e",))
    table = torch.randn(11, 3)
    padded = rule.to_mcore([table], ARCHITECTURE, 16)
    assert padded.shape == (16, 3) and padded[11:].abs().sum() == 0
    assert torch.equal(rule.to_hf(padded, ARCHITECTURE)[0], table)
    with pytest.raises(RuntimeError, match="11 rows, more than the model's 8"):
        rule.to_mcore([table], ARCHITECTURE, 8)


def table(*rules):
    return TensorTable(rules, ARCHITECTURE, "the folder")


def test_missing_and_unknown_tensors_are_named() -> None:
    renames = table(Rename("a.0", ("x.0",)), Rename("a.1", ("x.1",)))
    with pytest.raises(CheckpointError, match="^the folder does .*lacks 'a.1'; it has unknown 'other'$"):
        renames.require_mcore_names({"a.0", "other"})
    with pytest.raises(CheckpointError, match="lacks 'x.0', 'x.1'"):
        renames.require_hf_names(set())
    renames.require_hf_names({"x.0", "x.1", "lm_head.weight", "model.layers.0.rotary_emb.inv_freq"})


def test_wrong_shape_is_named() -> None:
    merged = table(MergeQKV("qkv", ("q", "k", "v")), Vocabulary("e", ("hf.e",)))
    with pytest.raises(CheckpointError, match=r"the folder: 'qkv' of shape \[39, 24\] does not fit"):
        list(merged.to_hf("qkv", torch.zeros(39, 24)))
    with pytest.raises(CheckpointError, match=r"'q' of shape \[23\] does not fit"):
        merged.to_mcore("qkv", lambda _: torch.zeros(23), 16)
    for bad in (torch.zeros(17, 3), torch.zeros(())):
        with pytest.raises(CheckpointError, match="'hf.e' of shape .* does not fit"):
            merged.to_mcore("e", lambda _, bad=bad: bad, 16)
