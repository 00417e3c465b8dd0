"""``plot``: loss, its LM and KD terms, throughput, learning rate and gradient norm of one or several runs, as a PNG.

megatron-kd plot RUN… [output=plot.png] [x=steps|tokens|flops] [smooth=20]
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_kd.errors import DataError
from megatron_kd.metrics.tracker import METRICS_NAME, read_metrics

X_KEYS = {"steps": "step", "tokens": "tokens", "flops": "train_flops"}
X_LABELS = {"steps": "steps", "tokens": "training tokens", "flops": "training FLOPs, teacher's forward pass counted"}
PANELS = (
    ("loss", "training loss (nats per token)"),
    ("lm_loss", "LM term (nats per token); dots: held-out loss"),
    ("kd_loss", "distillation term (nats per token)"),
    ("tokens_per_second", "tokens per second"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm before clipping"),
)
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Distinguishable in grey and to colour-blind readers (Okabe and Ito)."""
LINES = ("-", "--", "-.", ":")
SMOOTHED = ("loss", "lm_loss", "kd_loss", "tokens_per_second", "grad_norm")


@dataclass(frozen=True)
class PlotConfig:
    """The keys of ``plot``; arguments without ``=`` are values of ``runs``."""

    runs: tuple[str, ...] = ()
    output: str = "plot.png"
    x: Literal["steps", "tokens", "flops"] = "steps"
    smooth: int = 20
    """Steps of the moving mean; 1 draws the measured values."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if not self.runs:
            yield "name at least one run folder: plot RUN…"
        if self.smooth < 1:
            yield f"'smooth' must be at least 1, not {self.smooth}"
        if not self.output.endswith(".png"):
            yield f"'output' must end in .png, not {self.output}"


def run(config: PlotConfig) -> Path:
    """Draw the runs and return the file's path.

    Raises:
        DataError: a folder is not a run folder, or its run has not done a step.
    """
    runs = {name: read_training_rows(Path(name)) for name in config.runs}
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_of(runs, config.x, config.smooth).savefig(path, dpi=120)
    sys.stdout.write(f"{path}\n")
    return path


def read_training_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of a run folder.

    Raises:
        DataError: the folder is not a run folder, or its run has not done a step.
    """
    rows = read_metrics(folder)
    if not any("loss" in row for row in rows):
        raise DataError(f"{folder / METRICS_NAME} has no training step yet")
    return rows


def series(rows: Sequence[dict[str, Any]], x: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y, each ``[n]``, of the n rows that have ``key``."""
    points = [(row[X_KEYS[x]], row[key]) for row in rows if row.get(key) is not None and X_KEYS[x] in row]
    values = np.asarray(points, dtype=float).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and up to ``window`` - 1 values before it; the length is unchanged."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def figure_of(runs: dict[str, list[dict[str, Any]]], x: str, smooth: int) -> Any:
    """Return a matplotlib figure with a panel per quantity and a line per run; empty panels are left out."""
    from matplotlib.figure import Figure

    panels = [(key, title) for key, title in PANELS if any(_has(rows, key) for rows in runs.values())]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * lines), layout="constrained")
    grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes, (key, title) in zip(grid, panels):
        for index, (name, rows) in enumerate(runs.items()):
            _draw(axes, key, name, rows, x, smooth, index)
        if key in ("loss", "lm_loss"):
            _zoom_past_the_start(axes, [series(rows, x, key)[1] for rows in runs.values()])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(X_LABELS[x], fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    grid[0].legend(fontsize=8)
    return figure


def _has(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(row.get(key) for row in rows)


def _draw(axes: Any, key: str, name: str, rows: list[dict[str, Any]], x: str, smooth: int, index: int) -> None:
    if not _has(rows, key):
        return
    colour, line = COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]
    places, values = series(rows, x, key)
    if key in SMOOTHED and smooth > 1:
        axes.plot(places, values, color=colour, alpha=0.15, linewidth=0.8)
        values = moving_mean(values, min(smooth, max(1, len(values) // 5)))
    axes.plot(places, values, color=colour, linestyle=line, linewidth=1.4, label=Path(name).name)
    if key == "lm_loss":
        places, values = series(rows, x, "eval_loss")
        axes.plot(places, values, color=colour, marker="o", markersize=4, linestyle="none")


def _zoom_past_the_start(axes: Any, losses: Sequence[np.ndarray]) -> None:
    """Limit the y axis to the later losses; those of the first steps are far above and would flatten the rest."""
    losses = [values for values in losses if len(values)]
    if not losses:
        return
    top = max(float(np.quantile(values, 0.97)) for values in losses)
    bottom = min(float(values.min()) for values in losses)
    margin = 0.04 * (top - bottom) or 0.1
    axes.set_ylim(bottom - margin, top + margin)
