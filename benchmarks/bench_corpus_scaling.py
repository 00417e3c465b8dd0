"""Whether tokenising and selecting cost the same per unit at 1×, 4× and 16× the input; a chart in ``results``.

Tokenising: 24, 96 and 384 MB of JSONL (``--quick``: 4, 16, 64), ``tokenize_corpus`` packed and unshuffled with 2
workers. Selecting: a sixteenth, a quarter and all of 100 million scores (``--quick``: 10 million). Each run is a
process of its own; of tokenising CPU seconds are drawn, which others on the machine disturb less than seconds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import bench_corpus_select as select
from benchmarks.bench_corpus_tokenise import make_corpus, run_side

CHART = Path(__file__).parent / "results" / "corpus_scaling.png"
FACTORS = (1, 4, 16)


def measure(quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each tool and size, with its relative cost per unit of input; draw the chart at the end."""
    tokenised: list[dict[str, Any]] = []
    for factor in FACTORS:
        tokenised.append(against_first(tokenise(factor, quick, folder), tokenised))
        yield tokenised[-1]
    selected: list[dict[str, Any]] = []
    full = select.QUICK if quick else select.FULL
    select.write_scores(folder, full)
    for factor in FACTORS:
        run = select.in_process(select.run_ours, "select", folder, full // FACTORS[-1] * factor, 1)
        row = {"tool": "select", "factor": factor, "input": run["scores"] / 1e6, "unit": "million scores",
               "cost": run["seconds"], "peak_memory_mib": run["peak_gib"] * 1024}  # fmt: skip
        selected.append(against_first(row, selected))
        yield selected[-1]
    if not quick:
        draw({"tokenize_corpus (CPU seconds)": tokenised, "selection (seconds)": selected}, CHART)


def tokenise(factor: int, quick: bool, folder: Path) -> dict[str, Any]:
    """Run ``tokenize_corpus`` on ``factor`` times the smallest corpus."""
    here = folder / str(factor)
    here.mkdir()
    make_corpus(here, factor * (4 if quick else 24) << 20, 8_000)
    run = run_side("packed", here)
    return {"tool": "tokenize", "factor": factor, "input": run["megabytes"], "unit": "MB", "cost": run["cpu_seconds"],
            "seconds": run["seconds"], "peak_memory_mib": run["peak_memory_mib"]}  # fmt: skip


def against_first(row: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row with its cost per unit of input over that of the smallest input."""
    first = (before or [row])[0]
    return {**row, "cost_per_unit_against_1x": row["cost"] / row["input"] / (first["cost"] / first["input"])}


def describe(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    return (
        f"{row['tool']:<9}{row['factor']:>3}x {row['input']:>7.1f} {row['unit']:<15}{row['cost']:>7.2f} s  "
        f"{row['cost_per_unit_against_1x']:.2f} of 1x per unit  {row['peak_memory_mib']:,.0f} MiB"
    )


def draw(tools: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw cost and peak memory of every tool over the factor of its input."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    cost_axes, memory_axes = figure.subplots(1, 2)
    for (name, rows), marker in zip(tools.items(), "os", strict=True):
        factors = [row["factor"] for row in rows]
        label = f"{name}: 1x is {rows[0]['input']:.3g} {rows[0]['unit']}"
        (line,) = cost_axes.loglog(factors, [row["cost"] for row in rows], f"{marker}-", label=label)
        linear = [rows[0]["cost"] * factor for factor in factors]
        cost_axes.loglog(factors, linear, ":", color=line.get_color())
        memory_axes.semilogx(factors, [row["peak_memory_mib"] for row in rows], f"{marker}-", label=name.split(" (")[0])
    cost_axes.plot([], [], ":", color="grey", label="linear from 1x")
    cost_axes.set_ylim(top=10 * cost_axes.get_ylim()[1])  # room for the legend
    memory_axes.axhline(2048, ls="--", color="grey", label="limit")
    for axes, title, unit in ((cost_axes, "cost", "seconds"), (memory_axes, "peak memory, all processes", "MiB")):
        axes.set_xticks(FACTORS, [f"{factor}x" for factor in FACTORS])
        axes.minorticks_off()
        axes.set(xlabel="input", ylabel=unit, title=title)
        axes.legend(frameon=False, fontsize="small", loc="upper left" if axes is cost_axes else "best")
    memory_axes.set_ylim(0, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
