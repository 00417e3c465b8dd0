"""The fingerprint of weights: changed by one weight and by an exchange of two, not by the padding."""

import dataclasses

import pytest
import torch

from megatron_kd.checkpoints.loading import weights_fingerprint
from megatron_kd.models import gpt
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model


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
