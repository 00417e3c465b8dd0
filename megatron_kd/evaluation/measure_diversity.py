"""``measure_diversity``: the diversity of corpora, side by side, by standard measures that need no reference.

- **Vendi score** (Friedman & Dieng, arXiv 2210.02410): exp of the entropy of the eigenvalues of K / n, K the cosine
  similarities of n chunks: the effective number of different chunks, 1 to n.
- **Mean pairwise distance**: the mean of 1 − cosine over all pairs of distinct chunks.
- **n-gram diversity** (Padmakumar & He, arXiv 2309.05196): the sum over n = 1 … 4 of distinct n-grams / n-grams of ids.

Chunks are embedded as TF-IDF of their ids or, with ``model.path``, as a model's mean final hidden state. The MiniPLM
paper prints a semantic diversity without naming its measure, which need not be one of these. Corpora are compared on
equally many chunks and equally many ids; the idf is that of all corpora together.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.models.architecture import ScoredModelConfig
from megatron_kd.parallel.layout import ParallelConfig

MAX_NGRAM = 4
CHUNKS_PER_BATCH = 16


@dataclass(frozen=True)
class ComparedDataConfig:
    """The ``data.*`` keys of ``measure_diversity``."""

    paths: tuple[str, ...]
    """Chunk datasets of one tokenizer."""


@dataclass(frozen=True)
class OptionalModelConfig:
    """The ``model.*`` keys of ``measure_diversity``."""

    path: str | None = None
    """A checkpoint or Hugging Face folder that embeds the chunks; None for TF-IDF of their ids."""


@dataclass(frozen=True)
class MeasureDiversityConfig:
    """The keys of ``measure_diversity``."""

    data: ComparedDataConfig
    model: OptionalModelConfig = OptionalModelConfig()
    samples: int = 2000
    """Chunks per corpus, drawn at random without replacement."""
    seed: int = 0
    output: str | None = None
    """A JSON file for the figures, which are always printed."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if not self.data.paths:
            yield "'data.paths' names no dataset"
        if self.samples < 2:
            yield f"'samples' must be at least 2, not {self.samples}"


@dataclass(frozen=True)
class Diversity:
    """The measures of one corpus, taken on ``samples`` chunks, those of n-grams on ``ids`` ids."""

    path: str
    fingerprint: str
    embedding: str
    samples: int
    ids: int
    vendi_score: float
    mean_pairwise_distance: float
    ngram_diversity: float


def run(config: MeasureDiversityConfig) -> list[dict[str, Any]]:
    """Measure every corpus, print the figures and return them.

    Raises:
        DataError: a dataset is missing or damaged, or the tokenizers differ.
        CheckpointError: the model cannot be read.
    """
    datasets = [ChunkDataset.open(path) for path in config.data.paths]
    if len({dataset.tokenizer_hash for dataset in datasets}) > 1:
        hashes = ", ".join(f"{dataset.path}: {dataset.tokenizer_hash}" for dataset in datasets)
        raise DataError(f"corpora of several tokenizers cannot be compared by their ids: {hashes}")
    samples = min(config.samples, *(len(dataset) for dataset in datasets), config.samples)
    drawn = [_draw(dataset, samples, config.seed) for dataset in datasets]
    num_ids = min(sum(map(len, chunks)) for _, chunks in drawn)
    embedded = _embed(config, datasets, drawn)
    found = [
        asdict(Diversity(
            str(dataset.path), dataset.fingerprint, "tf-idf of ids" if config.model.path is None else config.model.path,
            samples, num_ids, vendi_score(vectors), mean_pairwise_distance(vectors),
            ngram_diversity(chunks, num_ids),
        ))
        for dataset, (_, chunks), vectors in zip(datasets, drawn, embedded, strict=True)
    ]  # fmt: skip
    text = json.dumps(found, indent=2) + "\n"
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(config.output), text)
    sys.stdout.write(text)
    return found


def vendi_score(vectors: np.ndarray) -> float:
    """Return exp(−Σ λ log λ), λ the eigenvalues of V Vᵀ / n for unit rows V ``[n, d]``."""
    # Vᵀ V has the same positive eigenvalues and may be smaller.
    gram = vectors.T @ vectors if vectors.shape[1] < vectors.shape[0] else vectors @ vectors.T
    eigenvalues = np.linalg.eigvalsh(gram / len(vectors))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def mean_pairwise_distance(vectors: np.ndarray) -> float:
    """Return the mean of 1 − cosine over the pairs of different rows of unit vectors ``[n, d]``."""
    count = len(vectors)
    total = float(np.square(vectors.sum(0)).sum()) - float(np.square(vectors).sum())
    return 1.0 - total / (count * (count - 1))


def ngram_diversity(chunks: list[np.ndarray], num_ids: int) -> float:
    """Return Σ over n = 1 … 4 of distinct / all n-grams inside chunks, counted on the first ``num_ids`` ids."""
    shortened, left = [], num_ids
    for chunk in chunks:
        shortened.append(chunk[:left])
        left -= len(shortened[-1])
        if not left:
            break
    score = 0.0
    for n in range(1, MAX_NGRAM + 1):
        windows = [np.lib.stride_tricks.sliding_window_view(chunk, n) for chunk in shortened if len(chunk) >= n]
        if windows:
            grams = np.concatenate(windows)
            score += len(np.unique(grams, axis=0)) / len(grams)
    return score


def tf_idf(corpora: list[list[np.ndarray]], vocab_size: int, eos_id: int) -> list[np.ndarray]:
    """Embed chunks as unit rows ``[n, d]`` of log-scaled counts times idf, over the d ids that occur in any corpus.

    Returns an array per corpus; the idf is that of all corpora together.
    """
    everything = [chunk[chunk != eos_id] for chunks in corpora for chunk in chunks]
    occurring = np.unique(np.concatenate(everything)) if everything else np.zeros(0, np.int64)
    column = np.full(vocab_size, -1)
    column[occurring] = np.arange(len(occurring))
    counts = np.zeros((len(everything), max(1, len(occurring))))
    for row, chunk in enumerate(everything):
        np.add.at(counts[row], column[chunk], 1.0)
    idf = np.log((1 + len(everything)) / (1 + (counts > 0).sum(0))) + 1
    vectors = _unit(np.log1p(counts) * idf)
    bounds = np.cumsum([0] + [len(chunks) for chunks in corpora])
    return [vectors[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def _draw(dataset: ChunkDataset, samples: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    indices = np.sort(np.random.default_rng(seed).choice(len(dataset), samples, replace=False))
    return indices, [dataset[index] for index in indices.tolist()]


def _embed(
    config: MeasureDiversityConfig, datasets: list[ChunkDataset], drawn: list[tuple[np.ndarray, list[np.ndarray]]]
) -> list[np.ndarray]:
    if config.model.path is None:
        return tf_idf([chunks for _, chunks in drawn], datasets[0].vocab_size, datasets[0].eos_id)
    return _mean_hidden_states(config.model.path, datasets, [indices for indices, _ in drawn])


def _mean_hidden_states(path: str, datasets: list[ChunkDataset], indices: list[np.ndarray]) -> list[np.ndarray]:
    """Return the mean final hidden state of each chunk over its unmasked positions: unit rows ``[n, hidden]``."""
    # TF-IDF needs neither torch nor Megatron-Core.
    import torch

    from megatron_kd.checkpoints.weights import load_for_inference
    from megatron_kd.parallel.runtime import Runtime, distributed_runtime
    from megatron_kd.selection.proxy import read_batch

    def embed(dataset: ChunkDataset, rows: np.ndarray, runtime: Runtime) -> np.ndarray:
        (model,) = load_for_inference(ScoredModelConfig(path), ParallelConfig(), dataset, runtime).model_chunks
        vectors = []
        for start in range(0, len(rows), CHUNKS_PER_BATCH):
            batch = read_batch(dataset, rows[start : start + CHUNKS_PER_BATCH]).to(runtime.device)
            hidden = model(batch.tokens, batch.position_ids, None).float().transpose(0, 1)
            mask = batch.loss_mask.unsqueeze(-1)
            vectors.append(((hidden * mask).sum(1) / mask.sum(1).clamp_min(1.0)).double().cpu().numpy())
        return _unit(np.concatenate(vectors))

    with distributed_runtime() as runtime, torch.no_grad():
        if runtime.world_size > 1:
            raise DataError("measure_diversity runs on one rank: start it without torchrun")
        return [embed(dataset, rows, runtime) for dataset, rows in zip(datasets, indices, strict=True)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)
