"""``score_corpus``: the mean negative log-likelihood per token of every chunk under a model, into a score file.

    torchrun --nproc-per-node 2 tools/score_corpus.py data.path=CORPUS model.path=RUN output=SCORES

Replicas of the model take units of chunks as they become free. Finished units are kept in ``<output>.partial``: a run
that was killed resumes, on any number of ranks, and gives the same scores.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.checkpoints.weights import LoadedModel, load_for_inference
from megatron_kd.config import to_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.models.parameters import weights_fingerprint
from megatron_kd.parallel.coordination import on_main_rank
from megatron_kd.parallel.runtime import Runtime, distributed_runtime
from megatron_kd.scoring.chunk_losses import ChunkLosses, ChunkScorer
from megatron_kd.scoring.journal import ScoreJournal, fill_journal
from megatron_kd.scoring.leakage import refuse_training_data, training_datasets
from megatron_kd.scoring.micro_batches import MicroBatch, MicroBatchPlan, width_multiple
from megatron_kd.scoring.score_config import ScoreCorpusConfig
from megatron_kd.scoring.score_file import KIND, ScoreFile, write_score_file

__all__ = ["ScoreCorpusConfig", "mean_losses", "run"]

logger = logging.getLogger(__name__)


def run(config: ScoreCorpusConfig) -> Path:
    """Score every chunk and return the score file's folder.

    Raises:
        DataError: the dataset is damaged, or is the model's own reference split; the output is something else; a loss
            is not finite.
        CheckpointError: the model is missing, damaged, or made for another tokenizer.
    """
    with distributed_runtime() as runtime:
        dataset = ChunkDataset.open(config.data.path)
        loaded = load_for_inference(config.model, config.parallel, dataset, runtime)
        if not config.force:
            on_main_rank(lambda: refuse_training_data(loaded.info.manifest, loaded.info.path, dataset))
        fingerprint = weights_fingerprint(loaded.model_chunks, loaded.groups.intra_dist_opt)
        plan = _plan(config, dataset, loaded)
        with WorkStore(config.output, _recipe(config, dataset, loaded, fingerprint, plan)) as store:
            if not on_main_rank(lambda: _is_made(store)):
                _score(config, dataset, loaded, fingerprint, plan, store, runtime)
    return Path(config.output)


def mean_losses(losses: ChunkLosses, first_chunk: int = 0) -> np.ndarray:
    """Return the mean loss per token of each chunk, float32; NaN where a chunk has no unmasked position.

    Raises:
        DataError: a loss is NaN or infinite, as a damaged model's is.
    """
    broken = np.flatnonzero(~np.isfinite(losses.nats))
    if len(broken):
        raise DataError(
            f"{len(broken)} chunks have a loss that is not finite, the first is chunk {first_chunk + broken[0]}: "
            "is the model damaged, or precision too low?"
        )
    with np.errstate(invalid="ignore"):
        return (losses.nats / losses.tokens).astype(np.float32)


def _score(
    config: ScoreCorpusConfig,
    dataset: ChunkDataset,
    loaded: LoadedModel,
    fingerprint: str,
    plan: MicroBatchPlan,
    store: WorkStore,
    runtime: Runtime,
) -> None:
    """Compute the scores that the store lacks, then write the score file."""
    journal = ScoreJournal(store, plan)
    scorer = ChunkScorer(loaded.model_chunks, loaded.groups, dataset, runtime.device)

    def compute(micro_batches: list[MicroBatch], first_chunk: int) -> np.ndarray | None:
        losses = scorer.unit(micro_batches)
        return None if losses is None else mean_losses(losses, first_chunk)

    on_main_rank(store.claim)
    fill_journal(journal, loaded.groups, runtime, compute)
    on_main_rank(lambda: _write(config, dataset, loaded, fingerprint, recipe_of(store.recipe), journal.gather()))
    on_main_rank(store.remove)


def _plan(config: ScoreCorpusConfig, dataset: ChunkDataset, loaded: LoadedModel) -> MicroBatchPlan:
    multiple = width_multiple(loaded.groups.tp.size(), config.parallel.sequence_parallel)
    return MicroBatchPlan(dataset, config.micro_batch_size, multiple, config.chunks_per_unit)


def _recipe(
    config: ScoreCorpusConfig, dataset: ChunkDataset, loaded: LoadedModel, fingerprint: str, plan: MicroBatchPlan
) -> dict[str, Any]:
    return {
        "tool": "score_corpus", "dataset": dataset.fingerprint, "model": fingerprint,
        "precision": _precision(config, loaded), "micro_batch_size": config.micro_batch_size,
        "chunks_per_unit": plan.chunks_per_unit,
    }  # fmt: skip


def _is_made(store: WorkStore) -> bool:
    if not already_made(store.output, KIND, recipe_of(store.recipe)):
        return False
    ScoreFile.open(store.output)
    store.remove_leftovers()
    logger.info(f"{store.output}: already made from this dataset and model")
    return True


def _precision(config: ScoreCorpusConfig, loaded: LoadedModel) -> str:
    return config.model.precision or loaded.info.manifest["precision"]


def _write(
    config: ScoreCorpusConfig,
    dataset: ChunkDataset,
    loaded: LoadedModel,
    fingerprint: str,
    recipe: str,
    scores: np.ndarray,
) -> None:
    manifest = loaded.info.manifest
    write_score_file(
        config.output,
        scores,
        dataset,
        model={
            "path": str(loaded.info.path),
            "fingerprint": fingerprint,
            "parameters": loaded.info.architecture.parameters,
            "trained_on": manifest.get("dataset_fingerprint"),
            "trained_on_path": manifest.get("dataset_path"),
            "trained_on_parts": training_datasets(manifest),
        },
        compute_dtype=_precision(config, loaded),
        producer={"tool": "score_corpus", "config": to_mapping(config), "recipe": recipe},
    )
    finite = scores[np.isfinite(scores)]
    mean = (
        f"mean {finite.mean(dtype=np.float64):.4f} nats per token"
        if len(finite)
        else "no chunk has a position that counts"
    )
    logger.info(f"{len(scores):,} chunks of {config.data.path} into {config.output}, {mean}")
