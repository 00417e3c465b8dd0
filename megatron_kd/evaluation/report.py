"""The quickstart's report: report.json, report.md, report.png and the printed table, from one :class:`Report`.

    Report  →  report.json  (read by scripts)
            →  report.md    (table, comparisons, checks, provenance)
            →  report.png   (held-out loss over training FLOPs, one line per method)

A gap between two students counts only if it is wider than the noise band: the gap between two runs of Pre-Train w/o KD
that differ in nothing but the seed. A gap inside the band is reported as 'no difference'.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.metrics.plot import COLOURS

BASELINE = "Pre-Train w/o KD"
NO_DIFFERENCE = "no difference"
MARKERS = ("o", "s", "^", "D", "v", "P")
COUNTING = "6 N_s per token, and 2 N_t where a teacher runs; N = all parameters, tied weights once"


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation during training: FLOPs spent so far, held-out loss in nats per token."""

    flops: float
    loss: float


@dataclass(frozen=True)
class ModelResult:
    """A trained model and its result on the held-out split.

    Attributes:
        name: the method's name, or ``Teacher`` and ``Reference``.
        run_path: its run folder.
        hf_path: its Hugging Face folder; None if it was not exported.
        parameters: all parameters, tied weights once: the N of ``train_flops``.
        steps: optimizer steps.
        train_tokens: token positions trained on: steps x batch x sequence length.
        train_flops: training FLOPs, the teacher's forward pass counted (``costs/flops.py``).
        offline_flops: FLOPs of scoring and reference training, spent once before the student's training.
        heldout_loss: nats per predicted token.
        bits_per_byte: bits per UTF-8 byte of the predicted tokens.
        seconds: wall-clock time of training.
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
    """A claim that must hold for the table to mean anything."""

    claim: str
    holds: bool


@dataclass(frozen=True)
class Report:
    """Everything that the quickstart measured.

    Attributes:
        heldout: path of the held-out chunk dataset.
        students: one per method, the baseline among them.
        second_seed: the baseline with another seed.
        teacher: the teacher, which also scores the corpus.
        reference: the reference model of difference sampling.
        bigram_loss: held-out loss of the bigram baseline, nats per token.
        bigram_bits_per_byte: bits per byte of the bigram baseline.
        seconds: wall-clock time of the quickstart.
        facts: machine, versions and corpus sizes, copied into report.json.
        continuing: students whose method is meant to continue a trained model. They start from random weights here,
            so they need not beat the bigram baseline.
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
        """Gap in held-out loss between the two seeds of the baseline, in nats per token."""
        return abs(self.baseline.heldout_loss - self.second_seed.heldout_loss)

    def compare(self, one: ModelResult, other: ModelResult) -> str:
        """Return the gap in held-out loss of ``one`` against ``other``, or 'no difference' inside the noise band."""
        gap = one.heldout_loss - other.heldout_loss
        return NO_DIFFERENCE if abs(gap) <= self.noise_band else f"{gap:+.4f}"

    def checks(self) -> list[Check]:
        """Return the claims that must hold for the order of the methods to mean anything."""
        held = [student for student in (*self.students, self.second_seed) if student.name not in self.continuing]
        worst = max(held, key=lambda student: student.heldout_loss)
        but = f" except those meant to continue a trained model ({', '.join(self.continuing)})"
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
    """Return the printed table: the students, then the models they are measured against."""
    rows: list[Sequence[str]] = [
        ("", "held-out loss", "bits/byte", f"against {BASELINE}", "train FLOPs", "offline FLOPs", "seconds")
    ]
    for student in report.students:
        against = "" if student is report.baseline else report.compare(student, report.baseline)
        rows.append(_row(student, student.name, against))
    rows.append(_row(report.second_seed, f"{BASELINE}, second seed", f"noise band {report.noise_band:.4f}"))
    rows.append(_row(report.teacher, f"Teacher ({_millions(report.teacher)})", ""))
    rows.append(_row(report.reference, f"Reference ({_millions(report.reference)})", ""))
    rows.append(("Bigram", f"{report.bigram_loss:.4f}", f"{report.bigram_bits_per_byte:.4f}", "", "", "", ""))
    return _aligned(rows)


def comparisons(report: Report) -> list[str]:
    """Compare every pair of students in a sentence each, the lower loss first."""
    ordered = sorted(report.students, key=lambda student: student.heldout_loss)
    lines = []
    for better, worse in itertools.combinations(ordered, 2):
        gap = report.compare(better, worse)
        lines.append(
            f"{better.name} and {worse.name}: {NO_DIFFERENCE}"
            if gap == NO_DIFFERENCE
            else f"{better.name} against {worse.name}: {gap.lstrip('+-')} lower"
        )
    return lines


def report_json(report: Report) -> dict[str, Any]:
    """Return the content of report.json, as JSON values."""
    return {
        "heldout": report.heldout,
        "students": [_as_mapping(student) for student in report.students],
        "teacher": _as_mapping(report.teacher),
        "reference": _as_mapping(report.reference),
        "bigram": {"heldout_loss": report.bigram_loss, "bits_per_byte": report.bigram_bits_per_byte},
        "noise_band": {"heldout_loss": report.noise_band, "second_seed": _as_mapping(report.second_seed)},
        "comparisons": comparisons(report),
        "checks": [dataclasses.asdict(check) for check in report.checks()],
        "flops": f"training {COUNTING}",
        "seconds": report.seconds,
        "facts": report.facts,
    }


def report_markdown(report: Report) -> str:
    """Return the content of report.md."""
    checks = [f"- {'yes' if check.holds else '**NO**'}: {check.claim}" for check in report.checks()]
    facts = [f"- {key}: {value}" for key, value in report.facts.items()]
    student = report.baseline
    return "\n".join(
        [
            "# Quickstart report",
            "",
            f"Students of {_millions(student)} parameters, each trained for {student.train_flops:.3g} FLOPs with the "
            f"teacher's forward pass counted ({COUNTING}). Losses are nats per token on the held-out documents. "
            f"Noise band: {report.noise_band:.4f}, the gap between two seeds of {BASELINE}; a gap inside is no "
            "difference. It comes from one pair of runs, so small gaps just outside it are hints at most.",
            "",
            result_table(report),
            "",
            "![held-out loss over training FLOPs](report.png)",
            "",
            "## Pair by pair",
            "",
            *[f"- {line}" for line in comparisons(report)],
            "",
            "## Checks",
            "",
            *checks,
            "",
            "## Provenance",
            "",
            f"- wall-clock time: {report.seconds:.0f} s",
            *facts,
            "",
        ]
    )


def write_report(folder: Path, report: Report) -> None:
    """Write report.json, report.md and report.png into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    curves_figure(report).savefig(folder / "report.png", dpi=120)
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
    """Return a Markdown table with columns aligned for a terminal, the first flush left and the others flush right."""
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


def curves_figure(report: Report) -> Figure:
    """Draw the students' evaluations: the whole of training on the left, its second half on the right."""
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
