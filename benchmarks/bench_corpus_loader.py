"""The training loader over 100 million chunks: seconds and memory until its first batch, and for batches anywhere.

The dataset has that many chunks of two ids (``--quick``: a hundredth), so that its index, 2 GB, is what a start has to
do with; ids of longer chunks are read when a batch needs them. Measured in a process of its own, from opening the
dataset (manifest and indices verified) on: the first global batch, then batches of random places in three epochs, as a
resumed run reads them. Memory is the peak of the process above what it held after its imports.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_kd.artefacts.artefact_folder import building  # noqa: E402
from megatron_kd.data.batch import make_batch  # noqa: E402
from megatron_kd.data.chunk_dataset import ChunkDataset  # noqa: E402
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter  # noqa: E402
from megatron_kd.data.chunk_order import BatchSchedule, ChunkOrder  # noqa: E402
from tests.reference.datasets import plain_tokenizer_info  # noqa: E402

CHUNKS, GLOBAL_BATCH, BATCHES = 100_000_000, 512, 100


def measure(quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield one row."""
    count = CHUNKS // 100 if quick else CHUNKS
    make_dataset(folder / "chunks", count)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=load, args=(folder / "chunks", theirs))
    process.start()
    theirs.close()
    yield {"chunks": count, "global_batch": GLOBAL_BATCH, **ours.recv()}
    process.join()


def describe(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    return (
        f"{row['chunks']:,} chunks: opened in {row['open_seconds']:.1f} s, first batch after "
        f"{row['first_batch_seconds']:.1f} s, a batch anywhere {1000 * row['batch_seconds']:.1f} ms, "
        f"{row['peak_gib']:.2f} GiB more than its imports"
    )


def make_dataset(path: Path, count: int) -> None:
    """Write chunks of two ids below 256."""
    with (
        building(path) as folder,
        closing(ChunkDatasetWriter(folder, plain_tokenizer_info(256), seq_length=1)) as writer,
    ):
        for start in range(0, count, 1_000_000):
            lengths = np.full(min(1_000_000, count - start), 2)
            writer.add(np.random.default_rng(start).integers(1, 256, 2 * len(lengths), dtype=np.uint16), lengths)
        writer.finish({"tool": "benchmark"})


def load(path: Path, pipe: Connection) -> None:
    """The measured process."""
    before = peak_gib()
    started = time.perf_counter()
    dataset = ChunkDataset.open(path)
    opened = time.perf_counter()
    schedule = BatchSchedule(ChunkOrder(len(dataset), seed=1), GLOBAL_BATCH)
    read(dataset, schedule, 0)
    first = time.perf_counter()
    for step in np.random.default_rng(2).integers(0, 3 * len(dataset) // GLOBAL_BATCH, BATCHES).tolist():
        read(dataset, schedule, step)
    ended = time.perf_counter()
    pipe.send({"open_seconds": opened - started, "first_batch_seconds": first - started,
               "batch_seconds": (ended - first) / BATCHES, "peak_gib": peak_gib() - before})  # fmt: skip


def read(dataset: ChunkDataset, schedule: BatchSchedule, step: int) -> None:
    """Read a whole global batch."""
    for rows in schedule.micro_batches(step, 0, 1, GLOBAL_BATCH):
        make_batch(dataset, rows, dataset.seq_length)


def peak_gib() -> float:
    """Return the peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
