"""What a teacher cache holds, for a person: ``inspect_dataset``."""

from pathlib import Path

import numpy as np

from megatron_kd.teachers.cache.cache_file import LogitCache
from megatron_kd.teachers.cache.codec import Codec

MOST_READ_CHUNKS = 500
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BIN_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.4, 1.0)
BAR_WIDTH = 40


def describe_cache(path: str | Path) -> list[str]:
    """Lines about a cache; its tail masses are those of at most ``MOST_READ_CHUNKS`` evenly spaced chunks."""
    cache = LogitCache.open(path)
    manifest, made_from = cache.manifest, cache.manifest["dataset"]
    return [
        f"  chunks       {cache.num_chunks:,} in {len(manifest['shards'])} shards, {manifest['tokens']:,} tokens, of "
        f"{made_from['path']} {made_from['fingerprint']}",
        f"  chunk ids    refer to {cache.root_fingerprint}",
        f"  codec        {describe_codec(cache.codec)}; {cache.codec.vocab_size:,} ids of {cache.codec.id_bits} bits",
        f"  size         {manifest['ids_per_token']} ids and {manifest['bytes_per_token']} bytes a token",
        f"  teacher      {manifest['teacher']['path']}, fingerprint {cache.teacher_fingerprint}",
        "  seen with    " + ", ".join(f"{key}={value}" for key, value in cache.view.to_mapping().items()),
        *describe_tail_mass(tail_masses(cache)),
    ]


def describe_codec(codec: Codec) -> str:
    """One phrase."""
    if codec.name == "sampled":
        drawn = f"sampled, {codec.max_ids} draws a token (seed {codec.seed})"
        return f"{drawn} from the teacher to the power of {codec.proposal_exponent}" if codec.is_weighted else drawn
    held = f" that hold {codec.top_p}, at most" if codec.name == "top_p" else ""
    return f"{codec.name}, the largest{held} {codec.max_ids} of a token"


def tail_masses(cache: LogitCache) -> np.ndarray:
    """float32, the probability outside of the kept ids, of the tokens of evenly spaced chunks."""
    rows = np.unique(np.linspace(0, cache.num_chunks - 1, MOST_READ_CHUNKS).astype(np.int64))
    return np.concatenate([cache.read(int(row)).tail for row in rows])


def describe_tail_mass(masses: np.ndarray) -> list[str]:
    """Mean, quantiles and a histogram."""
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
