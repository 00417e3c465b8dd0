"""Whether tokenising costs the same per byte at 1×, 4× and 16× the input; a chart in ``benchmarks/results``.

Sizes: 24, 96 and 384 MB of JSONL (``--quick``: 4, 16, 64), ``tokenize_corpus`` packed and unshuffled with 2 workers,
each run a process of its own. CPU seconds are less disturbed by others than wall seconds; both are recorded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench_corpus_tokenise import make_corpus, run_side

CHART = Path(__file__).parent / "results" / "corpus_scaling.png"


def measure(quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """One row a size, its cost per byte against the smallest one's; draws the chart at the end."""
    rows: list[dict[str, Any]] = []
    for factor in (1, 4, 16):
        here = folder / str(factor)
        here.mkdir()
        make_corpus(here, factor * (4 if quick else 24) << 20, 8_000)
        run = run_side("packed", here)
        row = {
            "side": "packed",
            "factor": factor,
            **run,
            "cpu_seconds_per_gb": 1000 * run["cpu_seconds"] / run["megabytes"],
        }
        row["cost_per_byte_against_1x"] = row["cpu_seconds_per_gb"] / (rows or [row])[0]["cpu_seconds_per_gb"]
        rows.append(row)
        yield row
    if not quick:
        draw(rows, CHART)


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    cost = f"{row['cpu_seconds_per_gb']:>6.1f} CPU s/GB ({row['cost_per_byte_against_1x']:.2f} of 1x)"
    return (
        f"{row['factor']:>3}x {row['megabytes']:>7.0f} MB  {row['seconds']:>7.2f} s  {cost}  "
        f"{row['peak_memory_mib']:,.0f} MiB"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and peak memory over input size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    sizes = [row["megabytes"] for row in rows]
    time_axes.loglog(sizes, [row["cpu_seconds"] for row in rows], "o-", label="CPU seconds")
    time_axes.loglog(sizes, [row["seconds"] for row in rows], "s-", label="seconds")
    first = rows[0]
    linear = [first["cpu_seconds"] * size / sizes[0] for size in sizes]
    time_axes.loglog(sizes, linear, ":", color="grey", label="linear")
    time_axes.set(xlabel="JSONL (MB)", ylabel="seconds", title="tokenize_corpus: time")
    time_axes.legend(frameon=False)
    memory_axes.semilogx(sizes, [row["peak_memory_mib"] for row in rows], "o-")
    memory_axes.set(xlabel="JSONL (MB)", ylabel="MiB", title="peak memory, all processes", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
