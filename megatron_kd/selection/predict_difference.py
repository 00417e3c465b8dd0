"""``predict_difference`` (MiniPLM_prx): r of every chunk, from a small proxy that learns it on a scored random subset.

    split_dataset → score_corpus of the subset with teacher and reference → predict_difference → sample_by_difference

Scored chunks keep the r that was measured; the proxy predicts the others. A tenth of the scored chunks is held out; how
well the proxy ranks them is printed and recorded. A run that was killed resumes with the trained proxy and the finished
units, as ``score_corpus`` does.
"""

import io
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.checkpoints.weights import LoadedModel, load_for_inference
from megatron_kd.config import to_mapping
from megatron_kd.data.batch import make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.logs import progress_bar
from megatron_kd.parallel.coordination import on_main_rank
from megatron_kd.parallel.layout import ParallelConfig
from megatron_kd.parallel.runtime import Runtime, distributed_runtime
from megatron_kd.scoring.journal import ScoreJournal, fill_journal
from megatron_kd.scoring.micro_batches import MicroBatch, MicroBatchPlan
from megatron_kd.scoring.score_file import DIFFERENCE_KIND, ScoreFile, write_score_file
from megatron_kd.selection.differences import measured_differences
from megatron_kd.selection.prediction_config import PredictDifferenceConfig, SubsetConfig
from megatron_kd.selection.proxy import DifferenceProxy, ranking_quality, train_proxy

__all__ = ["PredictDifferenceConfig", "run"]

logger = logging.getLogger(__name__)

HELDOUT_SHARE = 0.1
LEAST_SCORED = 20
PROXY_PART = "proxy"


@dataclass(frozen=True)
class MeasuredSubset:
    """The random part of a corpus that both models have scored: what a proxy learns r from, and is judged on.

    Attributes:
        subset: the dataset.
        chunks: indices in it of the n chunks that have a score.
        values: their r, float32 ``[n]``, nats per token.
        corpus_chunks: their indices in the corpus, int64 ``[n]``; -1 where the corpus lacks the chunk.
        is_heldout: which of them are not trained on, bool ``[n]``.
        parents: the two score files, for a manifest.
    """

    subset: ChunkDataset
    chunks: np.ndarray
    values: np.ndarray
    corpus_chunks: np.ndarray
    is_heldout: np.ndarray
    parents: list[dict[str, str]]

    @staticmethod
    def open(config: SubsetConfig, corpus: ChunkDataset, seed: int) -> "MeasuredSubset":
        """Open the subset and its two score files; ``seed`` draws the held-out chunks.

        Raises:
            DataError: corpus, subset and scores do not belong together; the reference model was trained on chunks of
                the subset; too few chunks are scored.
        """
        subset = ChunkDataset.open(config.path)
        if subset.root_fingerprint != corpus.root_fingerprint:
            raise DataError(
                f"{subset.path}: its chunks are of the root {subset.root_fingerprint}, those of {corpus.path} of "
                f"{corpus.root_fingerprint}; draw the subset from that corpus with split_dataset"
            )
        differences = measured_differences(config.teacher_scores, config.reference_scores, subset, config.force)
        values = differences.block(0, subset.num_chunks)
        chunks = np.flatnonzero(~np.isnan(values))
        if len(chunks) < LEAST_SCORED:
            raise DataError(
                f"{subset.path}: {len(chunks)} scored chunks are too few to learn from, at least {LEAST_SCORED} are "
                "needed; draw a larger fraction with split_dataset"
            )
        places = _places(np.asarray(subset.chunk_ids)[chunks], corpus)
        is_heldout = _draw_heldout(len(chunks), seed)
        return MeasuredSubset(subset, chunks, values[chunks], places, is_heldout, differences.parents)

    @property
    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Chunks to learn from, and their r."""
        return self.chunks[~self.is_heldout], self.values[~self.is_heldout]

    @property
    def heldout(self) -> tuple[np.ndarray, np.ndarray]:
        """Chunks to judge the proxy by, and their r."""
        return self.chunks[self.is_heldout], self.values[self.is_heldout]


def _places(root_ids: np.ndarray, corpus: ChunkDataset) -> np.ndarray:
    """Return the indices in the corpus of the chunks with these ids in the root, -1 where it lacks one."""
    ids = np.asarray(corpus.chunk_ids)
    places = np.searchsorted(ids, root_ids)
    places[places == len(ids)] = 0
    return np.where(ids[places] == root_ids, places, -1)


def _draw_heldout(count: int, seed: int) -> np.ndarray:
    is_heldout = np.zeros(count, dtype=bool)
    order = np.random.default_rng(seed).permutation(count)
    is_heldout[order[: max(2, int(HELDOUT_SHARE * count))]] = True
    return is_heldout


def run(config: PredictDifferenceConfig) -> Path:
    """Train the proxy, predict, and write the differences.

    Raises:
        DataError: corpus, subset and scores do not belong together; too few chunks are scored; the output is something
            else.
        CheckpointError: the proxy's weights are missing, damaged, or made for another tokenizer.
    """
    with distributed_runtime() as runtime:
        dataset = ChunkDataset.open(config.data.path)
        measured = MeasuredSubset.open(config.subset, dataset, config.training.seed)
        with WorkStore(config.output, _recipe(config, dataset, measured)) as store:
            if not on_main_rank(lambda: _is_made(store)):
                _train_and_predict(config, dataset, measured, store, runtime)
    return Path(config.output)


def _train_and_predict(
    config: PredictDifferenceConfig,
    dataset: ChunkDataset,
    measured: MeasuredSubset,
    store: WorkStore,
    runtime: Runtime,
) -> None:
    start = replace(config.proxy, precision=config.proxy.precision or "fp32")  # it is trained, with plain AdamW
    loaded = load_for_inference(start, ParallelConfig(), dataset, runtime)
    plan = MicroBatchPlan(dataset, config.micro_batch_size, chunks_per_unit=config.chunks_per_unit)
    journal = ScoreJournal(store, plan)
    on_main_rank(store.claim)
    proxy = _trained_proxy(config, measured, loaded, store, runtime)
    quality = ranking_quality(proxy, measured.subset, *measured.heldout, config.micro_batch_size, runtime.device)
    _predict(proxy, dataset, journal, loaded, runtime)
    recipe = recipe_of(store.recipe)
    on_main_rank(lambda: _write(config, dataset, measured, loaded, quality, recipe, journal.gather()))
    on_main_rank(store.remove)


def _trained_proxy(
    config: PredictDifferenceConfig,
    measured: MeasuredSubset,
    loaded: LoadedModel,
    store: WorkStore,
    runtime: Runtime,
) -> DifferenceProxy:
    """Return the proxy, from the unfinished output if it was trained before."""
    chunks, targets = measured.training
    proxy = DifferenceProxy(
        loaded.model_chunks[0].requires_grad_(True), float(targets.mean()), float(targets.std()) or 1.0
    )
    if on_main_rank(lambda: store.is_whole(PROXY_PART)):
        saved = io.BytesIO(store.read(PROXY_PART).tobytes())
        proxy.load_state_dict(torch.load(saved, map_location=runtime.device, weights_only=True), strict=False)
        return proxy.eval()
    with progress_bar(config.training.train_iters, "proxy", "step", shown=runtime.is_main) as bar:

        def on_step(error: float) -> None:
            bar.set_postfix(mse=f"{error:.3f}", refresh=False)
            bar.update()

        train_proxy(proxy, measured.subset, chunks, targets, config.training, loaded.groups, runtime.device, on_step)
    on_main_rank(lambda: store.write(PROXY_PART, _serialized(proxy)))
    return proxy


def _serialized(proxy: DifferenceProxy) -> bytes:
    tensors = {name: value for name, value in proxy.state_dict().items() if isinstance(value, torch.Tensor)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _predict(
    proxy: DifferenceProxy,
    dataset: ChunkDataset,
    journal: ScoreJournal,
    loaded: LoadedModel,
    runtime: Runtime,
) -> None:
    @torch.no_grad()
    def compute(micro_batches: list[MicroBatch], first_chunk: int) -> np.ndarray:
        scores = np.zeros(sum(len(micro_batch.indices) for micro_batch in micro_batches), dtype=np.float32)
        for micro_batch in micro_batches:
            batch = make_batch(dataset, micro_batch.indices, micro_batch.width).to(runtime.device)
            scores[micro_batch.indices - first_chunk] = proxy(batch).cpu().numpy()
        return scores

    fill_journal(journal, loaded.groups, runtime, compute)


def _is_made(store: WorkStore) -> bool:
    if not already_made(store.output, DIFFERENCE_KIND, recipe_of(store.recipe)):
        return False
    ScoreFile.open(store.output, DIFFERENCE_KIND)
    store.remove_leftovers()
    logger.info(f"{store.output}: already made from this corpus, subset and proxy")
    return True


def _recipe(config: PredictDifferenceConfig, dataset: ChunkDataset, measured: MeasuredSubset) -> dict[str, Any]:
    return {
        "tool": "predict_difference", "dataset": dataset.fingerprint, "subset": measured.subset.fingerprint,
        "scores": [parent["fingerprint"] for parent in measured.parents], "proxy": to_mapping(config.proxy),
        "training": to_mapping(config.training), "micro_batch_size": config.micro_batch_size,
        "chunks_per_unit": config.chunks_per_unit,
    }  # fmt: skip


def _write(
    config: PredictDifferenceConfig,
    dataset: ChunkDataset,
    measured: MeasuredSubset,
    loaded: LoadedModel,
    quality: dict[str, Any],
    recipe: str,
    predicted: np.ndarray,
) -> None:
    is_here = measured.corpus_chunks >= 0
    predicted[measured.corpus_chunks[is_here]] = measured.values[is_here]
    write_score_file(
        config.output,
        predicted,
        dataset,
        model={"path": str(loaded.info.path), "fingerprint": recipe, "parameters": loaded.info.architecture.parameters},
        compute_dtype=config.proxy.precision or "fp32",
        producer={"tool": "predict_difference", "config": to_mapping(config), "recipe": recipe, "quality": quality,
                  "measured": int(is_here.sum())},
        kind=DIFFERENCE_KIND,
        parents=measured.parents,
    )  # fmt: skip
    logger.info(
        f"{dataset.num_chunks:,} chunks into {config.output}, {int(is_here.sum()):,} of them "
        f"measured; on {quality['heldout_chunks']} held-out chunks Pearson {quality['pearson']:.3f}, Spearman "
        f"{quality['spearman']:.3f}, {quality['better_half_found']:.1%} of the better half found"
    )
