"""``inspect_dataset``: what an artefact on disk is, what it holds, where it comes from, and whether it is intact.

python tools/inspect_dataset.py path=… [verify=true] [samples=3]
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_kd.artefacts.checksums import Checksums
from megatron_kd.artefacts.manifest import read_manifest
from megatron_kd.data.chunk_dataset import KIND as CHUNK_DATASET
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.tokenization import load_tokenizer
from megatron_kd.errors import DataError
from megatron_kd.scoring.score_file import DIFFERENCE_KIND, ScoreFile
from megatron_kd.scoring.score_file import KIND as SCORE_FILE

LOGIT_CACHE = "logit_cache"
"""``KIND`` of teachers/cache/cache_reader.py, which imports torch."""
SAMPLE_CHARACTERS = 300
MOST_READ_CHUNKS = 500
"""Chunks of a cache from which the tail mass is estimated."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BIN_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.4, 1.0)
BAR_WIDTH = 40


@dataclass(frozen=True)
class InspectDatasetConfig:
    """The keys of ``inspect_dataset``."""

    path: str
    """The artefact's folder."""
    verify: bool = False
    """Compare every checksum."""
    samples: int = 3
    """How many chunks of a dataset to decode and print."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.samples < 0:
            yield f"'samples' must not be negative, not {self.samples}"


def run(config: InspectDatasetConfig) -> None:
    """Print the description of an artefact.

    Raises:
        DataError: it is missing or damaged; every block is read with ``verify=true`` only.
    """
    manifest, checksums = read_manifest(config.path)
    describe = DESCRIBERS.get(manifest["kind"], _describe_other)
    lines = [f"{config.path}: {manifest['kind'].replace('_', ' ')}, fingerprint {manifest.get('fingerprint', 'none')}"]
    lines += describe(config, manifest)
    lines += [f"  made by      {manifest.get('producer', {}).get('tool', 'unknown')}"]
    lines += [f"  lineage      {line}" for line in lineage(manifest)]
    if config.verify:
        lines += [_verify(Path(config.path), checksums)]
    sys.stdout.write("\n".join(lines) + "\n")


def lineage(manifest: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """Yield a line per ancestor, indented by generation; ancestors that are missing or have changed are marked."""
    for parent in manifest.get("parents", []):
        role = f" ({parent['role']})" if "role" in parent else ""
        line = f"{'  ' * depth}← {parent['kind'].replace('_', ' ')}{role} {parent['path']} {parent['fingerprint'][:12]}"
        try:
            above, _ = read_manifest(parent["path"], parent["kind"])
        except DataError:
            yield f"{line} (missing or not readable)"
            continue
        if above["fingerprint"] != parent["fingerprint"]:
            yield f"{line} (replaced by {above['fingerprint'][:12]})"
            continue
        yield line
        yield from lineage(above, depth + 1)


def _describe_dataset(config: InspectDatasetConfig, manifest: dict[str, Any]) -> list[str]:
    dataset = ChunkDataset.open(config.path)
    lengths = dataset.lengths
    root = "this dataset" if dataset.is_root else dataset.root_fingerprint
    lines = [
        f"  chunks       {dataset.num_chunks:,} in {len(dataset.shards)} shards, "
        f"{dataset.num_tokens:,} ids of {dataset.dtype}",
        f"  lengths      {lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}; "
        f"seq_length {dataset.seq_length}",
        f"  tokenizer    {dataset.vocab_size:,} ids, eos {dataset.eos_id}, hash {dataset.tokenizer_hash}",
        f"  chunk ids    refer to {root}",
        *_describe_origin(dataset),
    ]
    if dataset.tokenizer_path.is_dir() and config.samples:
        backend = load_tokenizer(dataset.tokenizer_path).backend
        for index in np.unique(np.linspace(0, dataset.num_chunks - 1, config.samples).astype(np.int64)).tolist():
            text = backend.decode(dataset[index].tolist(), skip_special_tokens=False)[:SAMPLE_CHARACTERS]
            lines.append(f"  chunk {index:<7}{text!r}")
    return lines


def _describe_origin(dataset: ChunkDataset) -> Iterator[str]:
    """Yield role, domains and the tokenizer that chunks were converted from, as far as the manifest has them."""
    producer = dataset.manifest.get("producer", {})
    if "role" in producer:
        yield f"  role         {producer['role']}"
    if dataset.domains is not None:
        counts = np.bincount(dataset.domains, minlength=len(dataset.domain_names))
        pairs = sorted(zip(counts.tolist(), dataset.domain_names, strict=True), reverse=True)
        yield "  domains      " + ", ".join(f"{name} {count / max(1, len(dataset)):.1%}" for count, name in pairs)
    if "source_root_fingerprint" in producer:
        yield (
            f"  converted    from chunks of {producer['source_root_fingerprint']}, "
            f"tokenizer {producer['source_tokenizer_hash']}"
        )


def _describe_scores(config: InspectDatasetConfig, manifest: dict[str, Any]) -> list[str]:
    scores = ScoreFile.open(config.path, manifest["kind"])
    known = scores.scores[np.isfinite(scores.scores)]
    spread = (
        f"mean {known.mean(dtype=np.float64):.4f}, {known.min():.4f} to {known.max():.4f}" if len(known) else "none"
    )
    return [
        f"  scores       {len(scores.scores):,}: {spread} nats per token; {len(scores.unscored)} unscored",
        f"  quantity     {manifest['quantity']}",
        f"  model        {manifest['model'].get('path', 'unknown')}, fingerprint {scores.model_fingerprint}",
        "  seen with    " + ", ".join(f"{key}={value}" for key, value in scores.view.items()),
    ]


def _describe_cache(config: InspectDatasetConfig, manifest: dict[str, Any]) -> list[str]:
    # Caches are read with torch, which other artefacts do not need.
    from megatron_kd.teachers.cache.cache_reader import LogitCache

    cache = LogitCache.open(config.path)
    made_from = manifest["dataset"]
    rows = np.unique(np.linspace(0, cache.num_chunks - 1, MOST_READ_CHUNKS).astype(np.int64))
    tail_masses = np.concatenate([cache.read(int(row)).tail for row in rows])
    return [
        f"  chunks       {cache.num_chunks:,} in {len(manifest['shards'])} shards, {manifest['tokens']:,} tokens, of "
        f"{made_from['path']} {made_from['fingerprint']}",
        f"  chunk ids    refer to {cache.root_fingerprint}",
        f"  codec        {cache.codec.describe()}; {cache.codec.vocab_size:,} ids of {cache.codec.id_bits} bits",
        f"  size         {manifest['ids_per_token']} ids and {manifest['bytes_per_token']} bytes per token",
        f"  teacher      {manifest['teacher']['path']}, fingerprint {cache.teacher_fingerprint}",
        "  seen with    " + ", ".join(f"{key}={value}" for key, value in cache.view.to_mapping().items()),
        *describe_tail_mass(tail_masses),
    ]


def _describe_other(config: InspectDatasetConfig, manifest: dict[str, Any]) -> list[str]:
    return [f"  {key:<12} {value}" for key, value in manifest.items() if isinstance(value, (str, int, float))]


def _verify(path: Path, checksums: Checksums) -> str:
    total = sum(entry.size for entry in checksums.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        for name in checksums.files:
            checksums.verify_file(path, name, bar.update)
    return f"  verified     {len(checksums.files)} files, {total:,} bytes: every checksum agrees"


DESCRIBERS: dict[str, Callable[[InspectDatasetConfig, dict[str, Any]], list[str]]] = {
    CHUNK_DATASET: _describe_dataset,
    SCORE_FILE: _describe_scores,
    DIFFERENCE_KIND: _describe_scores,
    LOGIT_CACHE: _describe_cache,
}


def describe_tail_mass(masses: np.ndarray) -> list[str]:
    """Return mean, quantiles and a histogram of tail masses ``[tokens]``, as lines."""
    if not len(masses):
        return ["  tail mass    no token"]
    quantiles = np.quantile(masses, QUANTILES)
    listed = ", ".join(f"{share:.0%} {value:.2g}" for share, value in zip(QUANTILES, quantiles, strict=True))
    lines = [f"  tail mass    mean {masses.mean(dtype=np.float64):.4f} over {len(masses):,} tokens; quantiles {listed}"]
    counts = np.histogram(np.clip(masses, 0, 1), BIN_EDGES)[0]
    for low, high, count in zip(BIN_EDGES, BIN_EDGES[1:], counts, strict=False):
        share = count / len(masses)
        lines.append(f"    {f'{low:g} to {high:g}':<16}{share:>6.1%} {'#' * round(BAR_WIDTH * share)}".rstrip())
    return lines
