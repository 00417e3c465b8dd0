"""Parameters by name: parts (padding, indices, names), initial weights, the fingerprint of all weights."""

import dataclasses

import pytest
import torch

from megatron_kd.models import gpt
from megatron_kd.models.parameters import global_parameter_name, global_shape, take_local_part, weights_fingerprint
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model


def test_parts_pick_rows_and_columns_and_pad_with_zeros():
    whole = torch.arange(12.0).view(4, 3)
    part = take_local_part(whole, [torch.tensor([2, 3, 4, 5]), torch.tensor([0, 2])])
    assert part.tolist() == [[6, 8], [9, 11], [0, 0], [0, 0]]
    assert torch.equal(take_local_part(whole, [torch.arange(4), torch.arange(3)]), whole)
    assert take_local_part(torch.arange(3.0), [torch.tensor([1, 3])]).tolist() == [1, 0]


def test_names_and_shapes_of_an_unsharded_model_are_its_own():
    with distributed_runtime():
        model = tiny_model()
        for name, parameter in model.named_parameters():
            assert global_parameter_name(model, name) == name
            expected = (300, 32) if "embedding" in name else tuple(parameter.shape)
            assert global_shape(name, parameter, model) == expected
        assert global_parameter_name(model, "output_layer.weight") == "embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("local", "name"),
    [
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.1.input_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
    ],
)
def test_names_are_those_of_the_local_spec_under_transformer_engine_too(local, name):
    with distributed_runtime():
        assert global_parameter_name(tiny_model(), local) == name


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


def fingerprint(model):
    return weights_fingerprint([model], model.pg_collection.tp)


def test_equal_weights_have_equal_fingerprints():
    with distributed_runtime():
        assert fingerprint(tiny_model(seed=1)) == fingerprint(tiny_model(seed=1)) != fingerprint(tiny_model(seed=2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_bit_of_any_one_weight_counts(precision):
    with distributed_runtime():
        model = tiny_model(precision=precision)
        before = fingerprint(model)
        for parameter in model.parameters():
            flat = parameter.detach().view(-1)
            bits = flat.view(torch.int32 if precision == "fp32" else torch.int16)
            for index in (0, 1, flat.numel() // 3):
                bits[index] ^= 1
                assert fingerprint(model) != before
                bits[index] ^= 1
        assert fingerprint(model) == before


def test_an_exchange_of_two_weights_rows_or_columns_counts():
    with distributed_runtime():
        model = tiny_model()
        before = fingerprint(model)
        weight = model.decoder.layers[0].mlp.linear_fc2.weight.detach()
        original = weight.clone()
        for changed in (original.flip(0), original.flip(1), original[torch.randperm(32, generator=torch.Generator())]):
            weight.copy_(changed)
            assert fingerprint(model) != before
        weight.copy_(original)
        weight[0, 0], weight[0, 1] = original[0, 1], original[0, 0]
        assert fingerprint(model) != before
        weight.copy_(original)
        weight[1, 5], weight[2, 7] = original[2, 7], original[1, 5]
        assert fingerprint(model) != before


def test_equal_values_in_another_parameter_count():
    with distributed_runtime():
        model = tiny_model()
        before = fingerprint(model)
        first, second = (layer.mlp.linear_fc2.weight.detach() for layer in model.decoder.layers)
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        assert fingerprint(model) != before


def test_padding_does_not_count(monkeypatch):
    with distributed_runtime():
        before = fingerprint(tiny_model())
        monkeypatch.setattr(gpt, "VOCABULARY_MULTIPLE", 512)
        wide = tiny_model()
        assert wide.embedding.word_embeddings.weight.shape[0] == 512
        assert fingerprint(wide) == before
        wide.embedding.word_embeddings.weight.detach()[400] = 3.0
        assert fingerprint(wide) == before
        other = tiny_model(dataclasses.replace(TINY, vocab_size=299))
        assert fingerprint(other) != before
