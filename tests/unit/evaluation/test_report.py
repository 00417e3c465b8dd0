"""The report's contract: keys, noise band, checks, table and figure."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_kd.evaluation.report import (
    CurvePoint,
    ModelResult,
    Report,
    comparisons,
    curves_figure,
    report_json,
    report_markdown,
    result_table,
    write_report,
)


def result(name: str, loss: float, exported: bool = True) -> ModelResult:
    curve = tuple(CurvePoint(flops=1e12 * step, loss=loss + 2 / step) for step in range(1, 9))
    return ModelResult(
        name=name,
        run_path=f"runs/{name}",
        hf_path=f"hf/{name}" if exported else None,
        parameters=1_300_000,
        steps=8,
        train_tokens=4_096,
        train_flops=8 * 10**12,
        offline_flops=10**12 if "MiniPLM" in name else 0,
        heldout_loss=loss,
        bits_per_byte=loss / 2,
        seconds=41.5,
        curve=curve,
    )


@pytest.fixture
def report() -> Report:
    return Report(
        heldout="data/heldout",
        students=(
            result("Pre-Train w/o KD", 4.00),
            result("Vanilla KD", 4.04),
            result("MiniPLM", 3.80),
            result("MiniPLM + Vanilla KD", 3.79),
        ),
        second_seed=result("Pre-Train w/o KD", 4.05),
        teacher=result("Teacher", 3.5, exported=False),
        reference=result("Reference", 4.4, exported=False),
        bigram_loss=4.9,
        bigram_bits_per_byte=2.4,
        seconds=300.0,
        facts={"python": "3.11"},
    )


def test_noise_band_decides_what_is_a_difference(report: Report) -> None:
    baseline, vanilla, miniplm, both = report.students
    assert report.noise_band == pytest.approx(0.05)
    assert report.compare(vanilla, baseline) == "no difference"
    assert report.compare(miniplm, baseline) == "-0.2000"
    assert report.compare(baseline, miniplm) == "+0.2000"
    assert comparisons(report) == [
        "MiniPLM + Vanilla KD and MiniPLM: no difference",
        "MiniPLM + Vanilla KD against Pre-Train w/o KD: 0.2100 lower",
        "MiniPLM + Vanilla KD against Vanilla KD: 0.2500 lower",
        "MiniPLM against Pre-Train w/o KD: 0.2000 lower",
        "MiniPLM against Vanilla KD: 0.2400 lower",
        "Pre-Train w/o KD and Vanilla KD: no difference",
    ]


def test_json_keeps_the_contract(report: Report) -> None:
    content = json.loads(json.dumps(report_json(report), allow_nan=False))
    assert content["heldout"] == "data/heldout"
    assert [s["name"] for s in content["students"]] == [
        "Pre-Train w/o KD",
        "Vanilla KD",
        "MiniPLM",
        "MiniPLM + Vanilla KD",
    ]
    needed = {
        "name",
        "hf_path",
        "run_path",
        "train_tokens",
        "train_flops",
        "offline_flops",
        "heldout_loss",
        "bits_per_byte",
        "seconds",
    }
    for student in content["students"]:
        assert needed <= set(student)
    assert content["noise_band"]["heldout_loss"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, [True, True, True]),
        ({"teacher": result("Teacher", 3.795)}, [False, True, True]),
        ({"reference": result("Reference", 3.4)}, [True, False, True]),
        ({"bigram_loss": 4.049}, [True, True, False]),  # the second seed counts as a student
        ({"bigram_loss": 4.0, "continuing": ("Pre-Train w/o KD",)}, [True, True, False]),  # Vanilla KD is above
        ({"bigram_loss": 4.045, "continuing": ("Pre-Train w/o KD",)}, [True, True, True]),
    ],
)
def test_checks(report: Report, change: dict, holds: list[bool]) -> None:
    assert [check.holds for check in dataclasses.replace(report, **change).checks()] == holds


def test_table_lines_up_and_names_everyone(report: Report) -> None:
    lines = result_table(report).splitlines()
    assert len({len(line) for line in lines}) == 1
    text = "\n".join(lines)
    for name in ("Pre-Train w/o KD, second seed", "MiniPLM + Vanilla KD", "Teacher (1.30M)", "Bigram", "no difference"):
        assert name in text


def test_failed_check_stands_out(report: Report) -> None:
    assert "**NO**" not in report_markdown(report)
    assert "- **NO**: the teacher (5.0000)" in report_markdown(
        dataclasses.replace(report, teacher=result("Teacher", 5.0))
    )


def test_writes_all_three(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "out", report)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["teacher"]["heldout_loss"] == 3.5
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Quickstart report")
    image = (tmp_path / "out" / "report.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000


def with_losses(name: str, losses: list[float]) -> ModelResult:
    curve = tuple(CurvePoint(flops=1e9 * (i + 1), loss=loss) for i, loss in enumerate(losses))
    return ModelResult(name, "run", "hf", 1_000, len(losses), 10, len(losses) * 10**9, 0, losses[-1], 2.0, 1.0, curve)


def test_the_figure_has_a_line_per_method_and_zooms_into_the_second_half() -> None:
    names = ("Pre-Train w/o KD", "Vanilla KD", "MiniPLM", "MiniPLM + Vanilla KD")
    students = tuple(with_losses(name, [6.0, 5.0, 4.0 + i / 10, 3.0 + i / 10]) for i, name in enumerate(names))
    report = Report(
        "heldout",
        students,
        with_losses("Pre-Train w/o KD", [6.0, 5.0, 4.0, 3.05]),
        with_losses("Teacher", [2.5]),
        with_losses("Reference", [5.0]),
        5.5,
        2.0,
        10.0,
    )
    whole, end = curves_figure(report).axes
    for axes in (whole, end):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        for student in students:
            assert lines[student.name] == [point.loss for point in student.curve]
    assert "Bigram" in {line.get_label() for line in whole.get_lines()}
    low, high = end.get_ylim()
    # From half the budget (2e9 of 4e9 FLOPs) on: losses 5.0 down to 3.0, not the first point's 6.0.
    assert low < 3.0 and 5.0 < high < 6.0
    assert end.get_xlim()[0] == 2e9
