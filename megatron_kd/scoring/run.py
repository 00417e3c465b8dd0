"""``score_corpus``: the mean negative log-likelihood per token of every chunk under a model, into a score file.

torchrun --nproc-per-node 2 tools/score_corpus.py data.path=CORPUS model.path=RUN output=SCORES
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import numpy
from tqdm import tqdm

from megatron_kd.data.artefact_folder import refuse_existing
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.models.fingerprint import weights_fingerprint
from megatron_kd.models.loading import LoadedModel, ScoredModelConfig, load_for_inference
from megatron_kd.parallel.layout import ParallelConfig
from megatron_kd.parallel.runtime import Runtime, distributed_runtime
from megatron_kd.scoring.chunk_losses import ChunkLosses, chunk_losses
from megatron_kd.scoring.score_file import write_score_file


@dataclass(frozen=True)
class ScoredDataConfig:
    """The ``data.*`` keys of scoring."""

    path: str


@dataclass(frozen=True)
class ScoreCorpusConfig:
    """Everything that ``score_corpus`` reads."""

    data: ScoredDataConfig
    model: ScoredModelConfig
    output: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 16

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.micro_batch_size < 1:
            yield f"'micro_batch_size' must be at least 1, not {self.micro_batch_size}"


def run(config: ScoreCorpusConfig) -> Path:
    """Score every chunk and return the score file's folder."""
    refuse_existing(Path(config.output))
    with distributed_runtime() as runtime:
        dataset = ChunkDataset.open(config.data.path)
        loaded = load_for_inference(config.model, config.parallel, dataset, runtime)
        fingerprint = weights_fingerprint(loaded.chunks, loaded.groups.intra_dist_opt)
        scores = mean_losses(_score(config, dataset, loaded, runtime))
        if runtime.is_main:
            _write(config, dataset, loaded, fingerprint, scores)
    return Path(config.output)


def mean_losses(losses: ChunkLosses) -> numpy.ndarray:
    """Mean loss of a token per chunk, float32; NaN where a chunk has no unmasked position.

    Raises:
        DataError: a loss is NaN or infinite (a damaged model).
    """
    broken = numpy.flatnonzero(~numpy.isfinite(losses.nats))
    if len(broken):
        raise DataError(
            f"{len(broken)} chunks have a loss that is not finite, the first is chunk {broken[0]}: "
            "is the model damaged?"
        )
    with numpy.errstate(invalid="ignore"):
        return (losses.nats / losses.tokens).astype(numpy.float32)


def _score(config: ScoreCorpusConfig, dataset: ChunkDataset, loaded: LoadedModel, runtime: Runtime) -> ChunkLosses:
    with tqdm(
        total=dataset.num_chunks,
        desc="score",
        unit="chunk",
        disable=not runtime.is_main,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    ) as bar:
        return chunk_losses(
            loaded.chunks,
            loaded.groups,
            dataset,
            device=runtime.device,
            micro_batch_size=config.micro_batch_size,
            on_chunks=lambda count: bar.update(min(count, bar.total - bar.n)),
        )


def _write(
    config: ScoreCorpusConfig, dataset: ChunkDataset, loaded: LoadedModel, fingerprint: str, scores: numpy.ndarray
) -> None:
    write_score_file(
        config.output,
        scores,
        dataset,
        model={
            "path": str(loaded.info.path),
            "fingerprint": fingerprint,
            "parameters": loaded.info.architecture.parameters,
            "trained_on": loaded.info.manifest["dataset_fingerprint"],
        },
        compute_dtype=config.model.precision or loaded.info.manifest["precision"],
        producer={"tool": "score_corpus", "config": dataclasses.asdict(config)},
    )
    finite = scores[numpy.isfinite(scores)]
    mean = f"mean {finite.mean():.4f} nats a token" if len(finite) else "no chunk has an unmasked position"
    sys.stderr.write(f"score_corpus: {len(scores):,} chunks of {config.data.path} into {config.output}, {mean}\n")
