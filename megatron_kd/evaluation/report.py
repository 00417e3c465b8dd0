"""The quickstart's report: report.json, report.md, report.png and the printed table, from one :class:`Report`.

    Report  →  report.json  (what scripts read)
            →  report.md    (table, comparisons, checks, what it cost)
            →  report.png   (held-out loss over training FLOPs, one line a method; report_plot.py)

A gap between two students counts only when it is wider than the noise band: the gap between two runs of Pre-Train
w/o KD that differ in nothing but the seed. Inside it, 'no difference' is what is printed.

report.png: held-out loss over training FLOPs, one line a method.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_kd.artefacts.artefact_folder import write_file

BASELINE = "Pre-Train w/o KD"
NO_DIFFERENCE = "no difference"


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation during training: FLOPs spent so far, held-out loss in nats per token."""

    flops: float
    loss: float


@dataclass(frozen=True)
class ModelResult:
    """A trained model, judged on the held-out split.

    Attributes:
        name: the method's name, or ``Teacher`` and ``Reference``.
        run_path, hf_path: its run folder and its Hugging Face folder (None: not exported).
        parameters: all of them, tied weights once: the N of ``train_flops``.
        steps, train_tokens: optimizer steps, and token positions (batch x sequence length) that they went over.
        train_flops: with the teacher's forward pass counted (``costs/flops.py``).
        offline_flops: scoring and reference training, spent once before the student's training.
        heldout_loss: nats per predicted token. bits_per_byte: per UTF-8 byte of the predicted tokens.
        seconds: wall-clock time of the training step.
        curve: evaluations during training, oldest first.
    """

    name: str
    run_path: str
    hf_path: str | None
    parameters: int
    steps: int
    train_tokens: int
    train_flops: int
    offline_flops: int
    heldout_loss: float
    bits_per_byte: float
    seconds: float
    curve: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True)
class Check:
    """Something that must hold for the table to mean anything."""

    claim: str
    holds: bool


@dataclass(frozen=True)
class Report:
    """Everything that the quickstart measured.

    Attributes:
        heldout: path of the held-out chunk dataset.
        students: one per method, the baseline among them.
        second_seed: the baseline again, with another seed.
        teacher, reference: the two models that difference sampling needs.
        bigram_loss, bigram_bits_per_byte: the floor.
        facts: machine, versions, corpus sizes; goes into report.json as it is.
        continuing: students whose method is meant to continue a trained one: from random weights they are not held to
            the bigram model.
    """

    heldout: str
    students: tuple[ModelResult, ...]
    second_seed: ModelResult
    teacher: ModelResult
    reference: ModelResult
    bigram_loss: float
    bigram_bits_per_byte: float
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    continuing: tuple[str, ...] = ()

    @property
    def baseline(self) -> ModelResult:
        """The student that was pre-trained without a teacher."""
        return next(student for student in self.students if student.name == BASELINE)

    @property
    def noise_band(self) -> float:
        """Held-out loss between the two seeds of the baseline, in nats per token."""
        return abs(self.baseline.heldout_loss - self.second_seed.heldout_loss)

    def compare(self, one: ModelResult, other: ModelResult) -> str:
        """The gap in held-out loss of ``one`` against ``other`` as text, or 'no difference' inside the noise band."""
        gap = one.heldout_loss - other.heldout_loss
        return NO_DIFFERENCE if abs(gap) <= self.noise_band else f"{gap:+.4f}"

    def checks(self) -> list[Check]:
        """What must hold so that the order of the methods means something."""
        held = [student for student in (*self.students, self.second_seed) if student.name not in self.continuing]
        worst = max(held, key=lambda student: student.heldout_loss)
        but = f" but those that are meant to continue a trained one ({', '.join(self.continuing)})"
        best = min((*self.students, self.second_seed), key=lambda student: student.heldout_loss)
        teacher = self.teacher.heldout_loss
        return [
            Check(
                f"the teacher ({teacher:.4f}) is below every student (best {best.heldout_loss:.4f}, {best.name})",
                teacher < best.heldout_loss,
            ),
            Check(
                f"the teacher ({teacher:.4f}) is below the reference model ({self.reference.heldout_loss:.4f})",
                teacher < self.reference.heldout_loss,
            ),
            Check(
                f"every student{but if self.continuing else ''} (worst {worst.heldout_loss:.4f}, {worst.name}) is "
                f"below the bigram model ({self.bigram_loss:.4f})",
                worst.heldout_loss < self.bigram_loss,
            ),
        ]


def result_table(report: Report) -> str:
    """The table that is printed: students first, then what they are measured against."""
    rows = [("", "held-out loss", "bits/byte", f"against {BASELINE}", "train FLOPs", "offline FLOPs", "seconds")]
    for student in report.students:
        against = "" if student is report.baseline else report.compare(student, report.baseline)
        rows.append(_row(student, student.name, against))
    rows.append(_row(report.second_seed, f"{BASELINE}, second seed", f"noise band {report.noise_band:.4f}"))
    rows.append(_row(report.teacher, f"Teacher ({_millions(report.teacher)})", ""))
    rows.append(_row(report.reference, f"Reference ({_millions(report.reference)})", ""))
    rows.append(("Bigram", f"{report.bigram_loss:.4f}", f"{report.bigram_bits_per_byte:.4f}", "", "", "", ""))
    return _aligned(rows)


def comparisons(report: Report) -> list[str]:
    """Every pair of students in one sentence each, the lower loss first."""
    ordered = sorted(report.students, key=lambda student: student.heldout_loss)
    lines = []
    for better, worse in itertools.combinations(ordered, 2):
        gap = report.compare(better, worse)
        relation = NO_DIFFERENCE if gap == NO_DIFFERENCE else f"{gap.lstrip('+-')} lower"
        lines.append(
            f"{better.name} and {worse.name}: {relation}"
            if gap == NO_DIFFERENCE
            else f"{better.name} against {worse.name}: {relation}"
        )
    return lines


def report_json(report: Report) -> dict[str, Any]:
    """The content of report.json: JSON values only."""
    return {
        "heldout": report.heldout,
        "students": [_as_mapping(student) for student in report.students],
        "teacher": _as_mapping(report.teacher),
        "reference": _as_mapping(report.reference),
        "bigram": {"heldout_loss": report.bigram_loss, "bits_per_byte": report.bigram_bits_per_byte},
        "noise_band": {"heldout_loss": report.noise_band, "second_seed": _as_mapping(report.second_seed)},
        "comparisons": comparisons(report),
        "checks": [dataclasses.asdict(check) for check in report.checks()],
        "flops": "training 6 N_s a token, and 2 N_t where a teacher runs; N = all parameters, tied weights once",
        "seconds": report.seconds,
        "facts": report.facts,
    }


def report_markdown(report: Report) -> str:
    """The content of report.md."""
    checks = [f"- {'yes' if check.holds else '**NO**'}: {check.claim}" for check in report.checks()]
    facts = [f"- {key}: {value}" for key, value in report.facts.items()]
    student = report.baseline
    return "\n".join(
        [
            "# Quickstart report",
            "",
            f"Students of {_millions(student)} parameters, each trained for {student.train_flops:.3g} FLOPs with the "
            f"teacher's forward pass counted (6 N_s a token, and 2 N_t where a teacher runs; N = all parameters, tied "
            f"weights once). Losses are nats per token on the held-out documents. Noise band: {report.noise_band:.4f}, "
            f"the gap between two seeds of {BASELINE}; a gap inside it is no difference. It comes from one pair of "
            "runs: take small gaps just outside it as hints.",
            "",
            result_table(report),
            "",
            "![held-out loss over training FLOPs](report.png)",
            "",
            "## Pair by pair",
            "",
            *[f"- {line}" for line in comparisons(report)],
            "",
            "## Does it mean anything?",
            "",
            *checks,
            "",
            "## Made with",
            "",
            f"- wall-clock time: {report.seconds:.0f} s",
            *facts,
            "",
        ]
    )


def write_report(folder: Path, report: Report) -> None:
    """Write report.json, report.md and report.png into ``folder``."""

    folder.mkdir(parents=True, exist_ok=True)
    plot_curves(report, folder / "report.png")
    write_file(folder / "report.md", report_markdown(report))
    write_file(folder / "report.json", json.dumps(report_json(report), indent=2, allow_nan=False) + "\n")


def _as_mapping(result: ModelResult) -> dict[str, Any]:
    mapping = dataclasses.asdict(result)
    mapping["curve"] = [dataclasses.asdict(point) for point in result.curve]
    return mapping


def _millions(result: ModelResult) -> str:
    return f"{result.parameters / 1e6:.2f}M"


def _row(result: ModelResult, name: str, against: str) -> tuple[str, ...]:
    return (
        name,
        f"{result.heldout_loss:.4f}",
        f"{result.bits_per_byte:.4f}",
        against,
        f"{result.train_flops:.2e}",
        f"{result.offline_flops:.2e}" if result.offline_flops else "0",
        f"{result.seconds:.0f}",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal; the first is flush left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        + " |"
        for row in rows
    ]
    rule = (
        "|"
        + "|".join("-" * (width + 2) if column == 0 else "-" * (width + 1) + ":" for column, width in enumerate(widths))
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


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
    late = [
        point.loss
        for student in (*report.students, report.second_seed)
        for point in student.curve
        if point.flops >= start
    ]
    axes.set_xlim(start, budget * 1.02)
    if late:
        margin = 0.08 * (max(late) - min(late)) or 0.01
        axes.set_ylim(min(late) - margin, max(late) + margin)
