"""The copy of the kept half of a corpus beside ``cp`` of its shards: at most 1.25 times its time.

Ours reads and verifies every block, writes the kept chunks and their checksums. Both sides end with a flush to the disk
and are measured alternately, ``cp -r`` of the same folder's ``.bin`` and ``.idx`` files beside it.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_kd.artefacts.artefact_folder import building  # noqa: E402
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter  # noqa: E402
from megatron_kd.data.copy_chunks import copy_chunks  # noqa: E402
from tests.reference.datasets import plain_tokenizer_info  # noqa: E402

SEQ_LENGTH, VOCABULARY = 1024, 151_936
CHUNKS_PER_SHARD = 100_000
LIMIT = 1.25


def measure(quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield rows for keeping every second chunk at random, a tenth, and all; medians over rounds."""
    dataset = make_corpus(folder / "corpus", 100_000 if quick else 400_000)
    size = sum(path.stat().st_size for path in shards(dataset))
    for ratio in (0.5, 0.1, 1.0):
        kept = np.flatnonzero(np.random.default_rng(1).random(len(dataset)) < ratio)
        rounds = [(copy_seconds(dataset, kept, folder), cp_seconds(dataset, folder)) for _ in range(1 if quick else 3)]
        ours, cp = (statistics.median(side) for side in zip(*rounds, strict=True))
        ratios = sorted(one / other for one, other in rounds)
        yield {"ratio": ratio, "chunks": len(dataset), "corpus_bytes": size, "seconds": ours, "cp_seconds": cp,
               "over_cp": statistics.median(ratios), "over_cp_range": [ratios[0], ratios[-1]],
               "limit": LIMIT, "cores": len(os.sched_getaffinity(0))}  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    low, high = row["over_cp_range"]
    return (
        f"keep {row['ratio']:.0%} of {row['corpus_bytes'] / 1e9:.2f} GB: ours {row['seconds']:.2f} s, cp of the shards "
        f"{row['cp_seconds']:.2f} s: {row['over_cp']:.2f} x ({low:.2f} to {high:.2f})"
    )


def make_corpus(path: Path, count: int) -> ChunkDataset:
    """Write chunks of 960 to 1,025 random ids of Qwen's vocabulary, as sentence-end chunking makes them."""
    generator = np.random.default_rng(0)
    with (
        building(path) as folder,
        closing(ChunkDatasetWriter(folder, plain_tokenizer_info(VOCABULARY), SEQ_LENGTH, CHUNKS_PER_SHARD)) as writer,
    ):
        for start in range(0, count, 10_000):
            lengths = generator.integers(960, SEQ_LENGTH + 2, min(10_000, count - start))
            writer.add(generator.integers(1, VOCABULARY, int(lengths.sum()), dtype=np.int32), lengths)
        writer.finish({"tool": "benchmark"})
    return ChunkDataset.open(path)


def copy_seconds(dataset: ChunkDataset, kept: np.ndarray, folder: Path) -> float:
    """Time our copy, from an opened dataset to a whole artefact on the disk."""
    dataset = ChunkDataset.open(dataset.path)  # forgets which blocks are verified
    started = time.perf_counter()
    with building(folder / "ours") as output:
        with closing(ChunkDatasetWriter(output, dataset.tokenizer_info(), SEQ_LENGTH, CHUNKS_PER_SHARD)) as writer:
            copy_chunks(dataset, kept, writer)
            writer.finish({"tool": "benchmark"}, (), dataset.root_fingerprint, kept)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "ours")
    return seconds


def cp_seconds(dataset: ChunkDataset, folder: Path) -> float:
    """Time ``cp`` of the input's shards, and a flush of what it wrote."""
    (folder / "cp").mkdir()
    started = time.perf_counter()
    names = [str(path) for path in shards(dataset)]
    subprocess.run(["cp", "--reflink=never", *names, str(folder / "cp")], check=True)
    subprocess.run(["sync", *(str(folder / "cp" / Path(name).name) for name in names)], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "cp")
    return seconds


def shards(dataset: ChunkDataset) -> list[Path]:
    """Return the corpus's ``.bin`` and ``.idx`` files."""
    return [path for shard in dataset.shards for path in (shard.bin_path, shard.index_path)]
