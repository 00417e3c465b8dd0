"""Bigram language model over a chunk dataset: the baseline that every trained model has to beat.

The probabilities are interpolated with Witten-Bell weights, which need no hyperparameter:

    P(b | a) = λ(a) · c(a, b) / c(a) + (1 − λ(a)) · P(b),   λ(a) = c(a) / (c(a) + distinct successors of a)
    P(b)     = (c(b) + 1) / (Σ c + V)

(Witten and Bell 1991; Chen and Goodman 1998, section 2.) A token's loss is −log P(label | input), in nats, over the
same positions as a model's held-out loss: the mask of ``data/batch.py``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_kd.data.batch import TextBytes, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError

CHUNKS_PER_READ = 512


@dataclass(frozen=True)
class BigramModel:
    """The counts of a fitted bigram model, with n distinct pairs.

    Attributes:
        vocab_size: V.
        pairs: the pairs seen, input · V + label, sorted, int64 ``[n]``.
        pair_counts: occurrences of each pair, int64 ``[n]``.
        input_counts: how often each id was an input, int64 ``[V]``.
        successors: number of distinct labels after each id, int64 ``[V]``.
        label_counts: how often each id was a label, int64 ``[V]``.
    """

    vocab_size: int
    pairs: np.ndarray
    pair_counts: np.ndarray
    input_counts: np.ndarray
    successors: np.ndarray
    label_counts: np.ndarray

    def log_probabilities(self, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return log P(label | input) in nats, float64, for two int64 arrays of the same shape."""
        unigram = (self.label_counts[labels] + 1) / (self.label_counts.sum() + self.vocab_size)
        keys = inputs * self.vocab_size + labels
        places = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        seen = np.where(self.pairs[places] == keys, self.pair_counts[places], 0)
        context, distinct = self.input_counts[inputs], self.successors[inputs]
        weight = np.maximum(context + distinct, 1)
        # λ · c(a,b)/c(a) = c(a,b) / (c(a) + distinct); for an id never seen as input only the unigram remains.
        return np.log(np.where(context > 0, (seen + distinct * unigram) / weight, unigram))


@dataclass(frozen=True)
class BigramScore:
    """A bigram model's result on a dataset: mean nats per predicted token, bits per UTF-8 byte, predicted tokens."""

    loss: float
    bits_per_byte: float
    tokens: int


def fit_bigram(dataset: ChunkDataset) -> BigramModel:
    """Count the unmasked (input, label) pairs of a dataset, in 8 bytes of memory per token.

    Raises:
        DataError: the dataset has no unmasked position.
    """
    vocab_size = dataset.vocab_size
    keys = np.concatenate([inputs * vocab_size + labels for inputs, labels, _ in _unmasked(dataset)] or [np.zeros(0)])
    if not len(keys):
        raise DataError(f"{dataset.path}: has no position to predict, so no bigram can be counted")
    pairs, counts = np.unique(keys.astype(np.int64), return_counts=True)
    inputs, labels = np.divmod(pairs, vocab_size)
    return BigramModel(
        vocab_size=vocab_size,
        pairs=pairs,
        pair_counts=counts,
        input_counts=np.bincount(inputs, counts, minlength=vocab_size).astype(np.int64),
        successors=np.bincount(inputs, minlength=vocab_size),
        label_counts=np.bincount(labels, counts, minlength=vocab_size).astype(np.int64),
    )


def score_bigram(model: BigramModel, dataset: ChunkDataset) -> BigramScore:
    """Return the mean loss of ``model`` over the unmasked positions of a held-out dataset.

    Raises:
        DataError: the dataset has another vocabulary size, or no unmasked position.
    """
    if dataset.vocab_size != model.vocab_size:
        raise DataError(f"{dataset.path}: has a vocabulary of {dataset.vocab_size}, the bigram's is {model.vocab_size}")
    nats, tokens, text_bytes = 0.0, 0, 0
    for inputs, labels, num_bytes in _unmasked(dataset):
        nats -= float(model.log_probabilities(inputs, labels).sum())
        tokens += len(labels)
        text_bytes += num_bytes
    if not tokens:
        raise DataError(f"{dataset.path}: has no position to predict")
    return BigramScore(nats / tokens, nats / math.log(2) / max(text_bytes, 1), tokens)


def _unmasked(dataset: ChunkDataset) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield (inputs, labels, UTF-8 bytes of the labels) of the unmasked positions, a block of chunks at a time."""
    count_bytes = TextBytes(dataset.token_byte_lengths)
    for start in range(0, len(dataset), CHUNKS_PER_READ):
        indices = np.arange(start, min(start + CHUNKS_PER_READ, len(dataset)))
        batch = make_batch(dataset, indices, dataset.seq_length)
        mask = batch.loss_mask.numpy() > 0
        yield batch.tokens.numpy()[mask], batch.labels.numpy()[mask], count_bytes(batch)
