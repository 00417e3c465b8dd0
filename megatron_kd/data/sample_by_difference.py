"""Difference sampling (MiniPLM, arXiv 2410.17215): keep the chunks that a large model finds easier than a small one.

    python tools/sample_by_difference.py data.path=… teacher_scores=… reference_scores=… ratio=0.5 output=…

    r(chunk) = reference NLL − teacher NLL, both means per token  →  the floor(ratio · n) largest, in corpus order

Ties go to the lower chunk index. A chunk that the score files list as unscored is never kept. The result keeps, for
every chunk, its id in the root dataset.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_kd.config import to_mapping
from megatron_kd.data.artefact_folder import building
from megatron_kd.data.chunk_dataset import KIND, ChunkDataset, ChunkDatasetWriter
from megatron_kd.data.manifest import already_made, recipe_of
from megatron_kd.errors import DataError
from megatron_kd.scoring.score_file import ScoreFile

COPY_BYTES = 32 << 20
MAX_BINS = 200
_COUNTING_PIECE = 1 << 22


@dataclass(frozen=True)
class SampledDataConfig:
    """``data.*`` keys of ``sample_by_difference``: ``path``, the chunk dataset to sample from."""

    path: str


@dataclass(frozen=True)
class SampleByDifferenceConfig:
    """Keys of ``sample_by_difference``."""

    data: SampledDataConfig
    teacher_scores: str
    reference_scores: str
    output: str
    ratio: float = 0.5

    def validate(self) -> Iterator[str]:
        """Yield what is wrong."""
        if not 0 < self.ratio <= 1:
            yield f"ratio must be above 0 and at most 1, not {self.ratio}"


def run(config: SampleByDifferenceConfig) -> str:
    """Make the sampled dataset; returns its path.

    Raises:
        DataError: the dataset or a score file is missing or damaged; they do not match; nothing would be kept; the
            output exists and is something else.
    """
    dataset = ChunkDataset.open(config.data.path)
    teacher, reference = ScoreFile.open(config.teacher_scores), ScoreFile.open(config.reference_scores)
    _check_pair(teacher, reference)
    parents = [dataset.fingerprint, teacher.fingerprint, reference.fingerprint]
    recipe = recipe_of({"tool": "sample_by_difference", "parents": parents, "ratio": config.ratio})
    if already_made(config.output, KIND, recipe):
        ChunkDataset.open(config.output)
        _say(f"{config.output}: already made from these scores with this ratio, nothing to do")
        return config.output
    difference = np.subtract(reference.aligned_with(dataset), teacher.aligned_with(dataset), dtype=np.float32)
    kept = select_largest(difference, int(config.ratio * dataset.num_chunks))
    if not len(kept):
        raise DataError(
            f"{config.data.path}: ratio {config.ratio} of {dataset.num_chunks} chunks keeps none; raise ratio"
        )
    facts = selection_facts(difference, kept)
    with (
        building(config.output) as folder,
        closing(
            ChunkDatasetWriter(folder, dataset.tokenizer_info(), dataset.seq_length, _chunks_per_shard(dataset))
        ) as writer,
    ):
        copy_chunks(dataset, kept, writer)
        writer.add_extra_file(
            "selection.json", (json.dumps({"ratio": config.ratio, **facts}, indent=2) + "\n").encode()
        )
        _plot(difference, kept, folder / "selection.png")
        writer.add_extra_file("selection.png", (folder / "selection.png").read_bytes())
        fingerprint = writer.finish(
            {"tool": "sample_by_difference", "config": to_mapping(config), "selection": facts, "recipe": recipe},
            _parents(dataset, teacher, reference),
            dataset.root_fingerprint,
            dataset.root_ids(kept),
        )
    _say(
        f"kept {len(kept)} of {dataset.num_chunks} chunks, {writer.num_tokens / dataset.num_tokens:.1%} of the ids, "
        f"r ≥ {facts['threshold']:.4f} nats per token, {facts['share_negative']:.1%} of all have r < 0; "
        f"{config.output}, fingerprint {fingerprint[:12]}"
    )
    return config.output


def select_largest(difference: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest values, ascending, int64; ties to the lower index, NaN never.

    In time linear in n and with one copy of the values: the count-th largest is found by partition, everything above
    it is kept, and of those equal to it the first ones.

    Args:
        difference: float32 ``[n]``.
        count: how many; fewer are returned if fewer are not NaN.
    """
    values = difference[~np.isnan(difference)]
    count = min(count, len(values))
    if count <= 0:
        return np.zeros(0, dtype=np.int64)
    values.partition(len(values) - count)
    threshold = values[len(values) - count]
    del values
    above = difference > threshold
    equal = np.flatnonzero(difference == threshold)[: count - int(above.sum())]
    above[equal] = True
    return np.flatnonzero(above)


def copy_chunks(dataset: ChunkDataset, kept: np.ndarray, writer: ChunkDatasetWriter) -> None:
    """Append chunks of a dataset to ``writer``: runs of neighbours are copied as byte ranges, nothing is decoded.

    Args:
        dataset: where from; what is read is verified against its checksums.
        kept: chunk indices, ascending.
        writer: of the same dtype.
    """
    first = 0
    with tqdm(total=len(kept), unit="chunk", unit_scale=True, desc="copy", disable=None) as bar:
        for shard_number, shard in enumerate(dataset.shards):
            stop = int(np.searchsorted(kept, first + len(shard)))
            start = int(np.searchsorted(kept, first))
            local = kept[start:stop] - first
            for window in _windows(shard.lengths, local, dataset.dtype.itemsize):
                writer.add_bytes(dataset.read_runs(shard_number, window), shard.lengths[window])
                bar.update(len(window))
            first += len(shard)


def _windows(lengths: np.ndarray, local: np.ndarray, itemsize: int) -> Iterator[np.ndarray]:
    """Pieces of ``local`` of about ``COPY_BYTES`` each."""
    step = max(1, COPY_BYTES // max(1, int(lengths[:1000].mean() * itemsize))) if len(local) else 1
    for start in range(0, len(local), step):
        yield local[start : start + step]


def selection_facts(difference: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Numbers of a selection, for ``selection.json``; ``difference`` float32 ``[n]`` in nats per token."""
    scored = ~np.isnan(difference)
    count = int(scored.sum())
    return {
        "chunks": len(difference),
        "kept": len(kept),
        "unscored": len(difference) - count,
        "threshold": float(difference[kept].min()),
        "share_negative": float((difference < 0).sum() / max(count, 1)),
        "mean_all": float(difference[scored].mean(dtype=np.float64)) if count else 0.0,
        "mean_kept": float(difference[kept].mean(dtype=np.float64)),
    }


def _check_pair(teacher: ScoreFile, reference: ScoreFile) -> None:
    if teacher.model_fingerprint == reference.model_fingerprint:
        raise DataError(
            f"{teacher.path} and {reference.path}: scores of the same model ({teacher.model_fingerprint}); "
            "give the teacher's and the reference model's"
        )
    for key, value in teacher.view.items():
        if reference.view.get(key) != value:
            raise DataError(
                f"{teacher.path} was scored with {key} = {value}, {reference.path} with {reference.view.get(key)}; "
                "score both the same way"
            )


def _parents(dataset: ChunkDataset, teacher: ScoreFile, reference: ScoreFile) -> list[dict[str, str]]:
    return [
        {"kind": KIND, "path": str(dataset.path), "fingerprint": dataset.fingerprint},
        {"kind": "score_file", "role": "teacher", "path": str(teacher.path), "fingerprint": teacher.fingerprint},
        {"kind": "score_file", "role": "reference", "path": str(reference.path), "fingerprint": reference.fingerprint},
    ]


def _chunks_per_shard(dataset: ChunkDataset) -> int:
    return max((len(shard) for shard in dataset.shards), default=1)


def _plot(difference: np.ndarray, kept: np.ndarray, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low, high = _plot_range(difference)
    edges = np.linspace(low, high, int(np.clip(np.sqrt(len(difference)), 10, MAX_BINS)) + 1)
    everything = _histogram(difference, edges)
    chosen = _histogram(difference[kept], edges)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stairs(everything, edges, fill=True, color="#c8ccd4", label=f"all {len(difference):,} chunks")
    axes.stairs(chosen, edges, fill=True, color="#2b6cb0", label=f"kept {len(kept):,}")
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(low, high)
    axes.set_xlabel("r = reference NLL − teacher NLL (nats per token)")
    axes.set_ylabel("chunks")
    axes.set_title("Difference sampling: what was kept", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _plot_range(difference: np.ndarray) -> tuple[float, float]:
    """The range that holds all but the outermost 0.1% on each side, from at most 2^20 evenly spaced values."""
    values = difference[:: max(1, len(difference) >> 20)]
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    margin = max(0.05 * (high - low), 1e-3)
    return float(low - margin), float(high + margin)


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts per bin, values outside the edges in the outermost bins; NaN left out."""
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    for start in range(0, len(values), _COUNTING_PIECE):
        piece = values[start : start + _COUNTING_PIECE]
        piece = piece[~np.isnan(piece)]
        counts += np.histogram(np.clip(piece, edges[0], edges[-1]), edges)[0]
    return counts


def _say(line: str) -> None:
    sys.stdout.write(f"sample_by_difference: {line}\n")
