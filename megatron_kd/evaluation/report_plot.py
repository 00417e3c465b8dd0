"""report.png: held-out loss over training FLOPs, one line a method."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_kd.evaluation.report import BASELINE, ModelResult, Report

# Distinguishable in grey and to colour-blind readers (Okabe and Ito).
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_curves(report: Report, path: Path) -> None:
    """Write the figure of :func:`curves_figure` as a PNG."""
    figure = curves_figure(report)
    figure.savefig(path, dpi=120)


def curves_figure(report: Report) -> Figure:
    """The students' evaluations: all of them on the left, the second half of training on the right."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    whole, end = figure.subplots(1, 2)
    for axes in (whole, end):
        for index, student in enumerate(report.students):
            _draw(axes, student, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], "-", student.name)
        _draw(axes, report.second_seed, COLOURS[0], "", ":", f"{BASELINE}, second seed")
        axes.set_xlabel("training FLOPs, teacher's forward pass counted")
        axes.grid(alpha=0.3)
    whole.axhline(report.bigram_loss, color="grey", linestyle="--", linewidth=1, label="Bigram")
    whole.axhline(report.teacher.heldout_loss, color="grey", linestyle="-.", linewidth=1, label="Teacher, trained")
    whole.set_ylabel("held-out loss (nats per token)")
    whole.set_title("Whole run")
    whole.legend(fontsize=9)
    end.set_title("Second half")
    _zoom(end, report, max(student.train_flops for student in report.students))
    return figure


def _draw(axes: Axes, result: ModelResult, colour: str, marker: str, line: str, label: str) -> None:
    flops, losses = [point.flops for point in result.curve], [point.loss for point in result.curve]
    axes.plot(flops, losses, color=colour, marker=marker, markersize=4, linestyle=line, linewidth=1.5, label=label)


def _zoom(axes: Axes, report: Report, budget: float) -> None:
    start = budget / 2
    late = [point.loss for student in (*report.students, report.second_seed) for point in student.curve
            if point.flops >= start]
    axes.set_xlim(start, budget * 1.02)
    if late:
        margin = 0.08 * (max(late) - min(late)) or 0.01
        axes.set_ylim(min(late) - margin, max(late) + margin)
