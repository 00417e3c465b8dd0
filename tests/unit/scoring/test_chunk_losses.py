"""Chunk losses against float64 log_softmax over whole logits; totals; chunks without an unmasked position."""

import math

import numpy
import pytest
import torch

from megatron_kd.errors import DataError
from megatron_kd.losses import linear_distillation_loss
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.scoring import chunk_losses as scoring
from megatron_kd.scoring.chunk_losses import ChunkLosses, HeldoutLoss, chunk_losses, heldout_loss
from megatron_kd.scoring.score_corpus import mean_losses
from tests.distributed.training.runs import SEQ_LENGTH, VOCABULARY, make_dataset
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset
from tests.reference.naive_scores import naive_chunk_losses
from tests.reference.one_rank import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """19 chunks, three of them short, some with eos inside."""
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks", chunks=19)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 19, 32])
def test_equal_to_float64_whatever_the_micro_batch(dataset, micro_batch_size):
    with distributed_runtime():
        model = tiny_model()
        nats, tokens = naive_chunk_losses(model, dataset)
        told = []
        ours = chunk_losses(
            [model], model.pg_collection, dataset, device=CPU, micro_batch_size=micro_batch_size, on_chunks=told.append
        )
    assert ours.tokens.tolist() == tokens.tolist()
    numpy.testing.assert_allclose(ours.nats, nats, rtol=1e-5)
    assert sum(told) >= 19 and len(set(tokens)) > 2
    numpy.testing.assert_allclose(mean_losses(ours), nats / tokens, rtol=1e-5)


@pytest.mark.parametrize(("given", "used"), [(None, scoring.CPU_TILE_BYTES), (5000, 5000)])
def test_the_budget_reaches_the_loss(dataset, monkeypatch, given, used):
    budgets = set()

    def spy(*arguments, **keywords):
        budgets.add(keywords["tile_bytes"])
        return linear_distillation_loss(*arguments, **keywords)

    monkeypatch.setattr(scoring, "linear_distillation_loss", spy)
    with distributed_runtime():
        model = tiny_model()
        heldout_loss([model], model.pg_collection, dataset, device=CPU, micro_batch_size=8, tile_bytes=given)
    assert budgets == {used}


def test_bytes_are_those_of_the_predicted_tokens(dataset):
    """Every id but eos stands for one byte, so a predicted eos counts as a token and not as a byte."""
    with distributed_runtime():
        model = tiny_model()
        ours = chunk_losses([model], model.pg_collection, dataset, device=CPU, micro_batch_size=8)
    expected = []
    for chunk in range(dataset.num_chunks):
        (ids,), (length,) = dataset.gather(numpy.array([chunk]), SEQ_LENGTH + 1)
        expected.append(sum(1 for a, b in zip(ids[: length - 1], ids[1:length]) if a != 0 and b != 0))
    assert ours.text_bytes.tolist() == expected
    assert (ours.text_bytes < ours.tokens).any()


def test_a_chunk_without_an_unmasked_position_has_no_mean(tmp_path):
    chunks = [numpy.zeros(5, dtype=numpy.int64), numpy.arange(1, 6), numpy.array([0, 4])]
    dataset = write_chunk_dataset(tmp_path / "data", chunks, plain_tokenizer_info(VOCABULARY, 0), SEQ_LENGTH)
    with distributed_runtime():
        model = tiny_model()
        ours = chunk_losses([model], model.pg_collection, dataset, device=CPU, micro_batch_size=2)
    assert ours.tokens.tolist() == [0, 4, 0] and ours.nats[0] == ours.nats[2] == 0
    assert numpy.isnan(mean_losses(ours)).tolist() == [True, False, True]


def test_a_model_gone_wrong_is_refused_with_the_first_chunk():
    losses = ChunkLosses(numpy.array([1.0, math.nan, math.inf]), numpy.array([1, 1, 1]), numpy.array([1, 1, 1]))
    with pytest.raises(DataError, match="2 chunks have a loss that is not finite, the first is chunk 1"):
        mean_losses(losses)


def test_totals_and_the_models_mode(dataset):
    with distributed_runtime():
        model = tiny_model().train()
        ours = chunk_losses([model], model.pg_collection, dataset, device=CPU, micro_batch_size=8)
        totals = heldout_loss([model], model.pg_collection, dataset, device=CPU, micro_batch_size=5)
        assert model.training
    assert totals.tokens == ours.tokens.sum() and totals.nats == pytest.approx(ours.nats.sum(), rel=1e-6)


def test_bits_per_byte_in_closed_form():
    """1000 tokens of ln 2 nats each over 500 bytes are two bits a byte."""
    totals = HeldoutLoss(nats=1000 * math.log(2), tokens=1000, text_bytes=500)
    assert totals.bits_per_byte == pytest.approx(2.0) and totals.loss == pytest.approx(math.log(2))
    assert HeldoutLoss(0.0, 0, 0).loss == HeldoutLoss(0.0, 0, 0).bits_per_byte == 0
