"""Which models may read a dataset."""

from types import SimpleNamespace

import pytest

from megatron_kd.checkpoints.loading import check_same_tokenizer
from megatron_kd.errors import CheckpointError

DATASET = SimpleNamespace(path="chunks", tokenizer_hash="a", vocab_size=300)


def model(tokenizer_hash, vocab_size):
    return SimpleNamespace(
        path="teacher", tokenizer_hash=tokenizer_hash, architecture=SimpleNamespace(vocab_size=vocab_size)
    )


@pytest.mark.parametrize("rows", [300, 384])
def test_a_model_may_have_more_ids_than_the_tokenizer(rows):
    check_same_tokenizer(model("a", rows), DATASET)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (model("b", 300), "trained with tokenizer b, but the dataset chunks has a"),
        (model("a", 299), "teacher has embeddings for 299 ids, but the tokenizer of the dataset chunks has 300"),
    ],
)
def test_another_tokenizer_and_ids_without_embeddings_are_refused(given, message):
    with pytest.raises(CheckpointError, match=message):
        check_same_tokenizer(given, DATASET)
