"""The bigram baseline against counting by hand, and as a proper distribution."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.evaluation.bigram import fit_bigram, score_bigram
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

VOCABULARY = 13


def dataset_of(path: Path, chunks: list[list[int]], vocab_size: int = VOCABULARY) -> ChunkDataset:
    arrays = [np.array(chunk) for chunk in chunks]
    return write_chunk_dataset(path, arrays, plain_tokenizer_info(vocab_size, eos_id=0), seq_length=20)


def naive_loss(train: list[list[int]], heldout: list[list[int]]) -> tuple[float, int]:
    """The definition, one position after another; eos (0) as input is masked."""

    def positions(chunks: list[list[int]]) -> list[tuple[int, int]]:
        return [pair for chunk in chunks for pair in zip(chunk, chunk[1:]) if pair[0] != 0]

    pairs = Counter(positions(train))
    inputs, labels = Counter(), Counter()
    for (a, b), count in pairs.items():
        inputs[a] += count
        labels[b] += count
    total = 0.0
    for a, b in positions(heldout):
        unigram = (labels[b] + 1) / (sum(labels.values()) + VOCABULARY)
        distinct = sum(1 for pair in pairs if pair[0] == a)
        lam = inputs[a] / (inputs[a] + distinct) if inputs[a] else 0.0
        total -= math.log((lam * pairs[a, b] / inputs[a] if inputs[a] else 0.0) + (1 - lam) * unigram)
    return total, len(positions(heldout))


def random_chunks(count: int, seed: int, highest: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, highest, generator.integers(2, 21)).tolist() for _ in range(count)]


def test_equals_the_definition(tmp_path: Path) -> None:
    train, heldout = random_chunks(40, 1, 9), random_chunks(15, 2, VOCABULARY)  # ids 9 … 12 are never trained on
    model = fit_bigram(dataset_of(tmp_path / "train", train))
    score = score_bigram(model, dataset_of(tmp_path / "heldout", heldout))
    nats, tokens = naive_loss(train, heldout)
    assert score.tokens == tokens
    assert score.loss == pytest.approx(nats / tokens, rel=1e-12)
    text_bytes = sum(b != 0 for chunk in heldout for a, b in zip(chunk, chunk[1:]) if a != 0)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-12)


def test_is_a_distribution(tmp_path: Path) -> None:
    model = fit_bigram(dataset_of(tmp_path / "train", random_chunks(30, 3, 9)))
    everything = np.arange(VOCABULARY)
    for given in range(VOCABULARY):
        probabilities = np.exp(model.log_probabilities(np.full(VOCABULARY, given), everything))
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
        assert (probabilities > 0).all()


def test_more_than_one_block_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(tmp_path / "train", random_chunks(23, 4, 9))
    whole = score_bigram(fit_bigram(dataset), dataset)
    monkeypatch.setattr("megatron_kd.evaluation.bigram.CHUNKS_PER_READ", 5)
    assert score_bigram(fit_bigram(dataset), dataset).loss == pytest.approx(whole.loss, rel=1e-12)


def test_refuses_another_vocabulary_and_nothing_to_count(tmp_path: Path) -> None:
    model = fit_bigram(dataset_of(tmp_path / "train", [[1, 2, 3]]))
    with pytest.raises(DataError, match="vocabulary of 14, the bigram's is 13"):
        score_bigram(model, dataset_of(tmp_path / "other", [[1, 2]], vocab_size=14))
    with pytest.raises(DataError, match="no position"):
        fit_bigram(dataset_of(tmp_path / "empty", [[0, 1]]))
