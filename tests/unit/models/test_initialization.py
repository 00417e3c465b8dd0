"""Initial weights: what is drawn, and from what."""

import dataclasses

import torch

from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model


def test_matrices_biases_norms_and_padding():
    with distributed_runtime():
        parameters = dict(tiny_model().named_parameters())
    for name, parameter in parameters.items():
        if "layernorm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            rows = parameter[:300] if "embedding" in name else parameter
            assert 0.9 < rows.std() / TINY.init_std < 1.1 and abs(rows.mean()) < 0.02, name
    assert not parameters["embedding.word_embeddings.weight"][300:].any()


def test_equal_seeds_give_equal_weights_and_every_name_its_own():
    with distributed_runtime():
        torch.manual_seed(5)
        first = dict(tiny_model(seed=1).named_parameters())
        torch.manual_seed(6)
        again, other = dict(tiny_model(seed=1).named_parameters()), dict(tiny_model(seed=2).named_parameters())
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert torch.equal(parameter, other[name]) == (parameter.dim() == 1), name
    assert not torch.equal(
        first["decoder.layers.0.mlp.linear_fc1.weight"], first["decoder.layers.1.mlp.linear_fc1.weight"]
    )


def test_a_larger_vocabulary_keeps_the_other_weights():
    with distributed_runtime():
        small, large = (
            dict(tiny_model(dataclasses.replace(TINY, vocab_size=size)).named_parameters()) for size in (300, 500)
        )
    for name in small:
        assert torch.equal(small[name], large[name]) == ("embedding" not in name)
