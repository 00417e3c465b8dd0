"""Difference sampling's selection among 100 million scores, and how its cost grows: 1x, 4x, 16x.

Limits: 30 s and 2 GiB for 100 million. Each measurement is a process of its own; the figure of memory is its peak
resident set, the memory-mapped score files included. Beside it: a stable ``numpy.argsort`` of the same differences.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_kd.selection.top_values import Candidates, select_within_budget  # noqa: E402

FULL, QUICK = 100_000_000, 10_000_000
LIMIT_SECONDS, LIMIT_GIB = 30.0, 2.0


def measure(quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield rows: ours at 1/16, 1/4 and all of the scores, by count and stratified into 17 domains; argsort at 1/16."""
    full = QUICK if quick else FULL
    write_scores(folder, full)
    for count in (full // 16, full // 4, full):
        for name, domains in (("select", 1), ("select, 17 domains", 17)):
            yield in_process(run_ours, name, folder, count, domains)
    yield in_process(run_argsort, "argsort", folder, full // 16, 1)


def describe(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    return (
        f"{row['what']:<20} {row['scores']:>12,} scores {row['seconds']:7.2f} s  {row['peak_gib']:.2f} GiB, of which "
        f"{row['before_gib']:.2f} before it began"
    )


def write_scores(folder: Path, count: int) -> None:
    """Write two score arrays with many ties, 2% of the chunks without a score, and a domain for each chunk."""
    generator = np.random.default_rng(0)
    files = [open(folder / f"{name}.f32", "wb") for name in ("teacher", "reference")]
    with open(folder / "domains.u16", "wb") as domains:
        for start in range(0, count, 1 << 22):
            size = min(1 << 22, count - start)
            missing = generator.random(size) < 0.02
            for file, mean in zip(files, (2.3, 3.1), strict=True):
                scores = np.round(generator.normal(mean, 0.6, size), 4).astype(np.float32)
                scores[missing] = np.nan
                file.write(scores.tobytes())
            domains.write(generator.integers(0, 17, size).astype(np.uint16).tobytes())
    for file in files:
        file.close()


def in_process(body: Callable[..., int], name: str, folder: Path, count: int, domains: int) -> dict[str, Any]:
    """Run ``body`` in a fresh process; return its time, its memory and how many chunks it kept."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=timed, args=(body, folder, count, domains, theirs))
    process.start()
    theirs.close()
    row = ours.recv()
    process.join()
    return {"what": name, "scores": count, **row, "within_limits": row["seconds"] < LIMIT_SECONDS
            and row["peak_gib"] < LIMIT_GIB}  # fmt: skip


def timed(body: Callable[..., int], folder: Path, count: int, domains: int, pipe: Any) -> None:
    """The measured process."""
    before = peak_gib()
    started = time.perf_counter()
    kept = body(folder, count, domains)
    pipe.send({"seconds": time.perf_counter() - started, "kept": kept, "before_gib": before, "peak_gib": peak_gib()})


def run_ours(folder: Path, count: int, domains: int) -> int:
    """Select as ``sample_by_difference ratio=0.5`` does."""
    teacher, reference = (np.memmap(folder / f"{name}.f32", np.float32, "r") for name in ("teacher", "reference"))
    labels = np.memmap(folder / "domains.u16", np.uint16, "r")
    candidates = Candidates(
        count,
        lambda start, stop: reference[start:stop] - teacher[start:stop],
        groups=None if domains == 1 else lambda start, stop: labels[start:stop],
        num_groups=domains,
    )
    sizes = [count] if domains == 1 else np.bincount(labels[:count], minlength=domains).tolist()
    return int(np.flatnonzero(select_within_budget(candidates, [size // 2 for size in sizes])).shape[0])


def run_argsort(folder: Path, count: int, domains: int) -> int:
    """Select with a stable descending sort."""
    teacher, reference = (np.memmap(folder / f"{name}.f32", np.float32, "r") for name in ("teacher", "reference"))
    difference = reference[:count] - teacher[:count]
    return len(np.sort(np.argsort(-difference, kind="stable")[: count // 2]))


def peak_gib() -> float:
    """Return the peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
