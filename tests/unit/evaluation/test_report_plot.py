"""What stands in the figure."""

from megatron_kd.evaluation.report import CurvePoint, ModelResult, Report, curves_figure


def result(name: str, losses: list[float]) -> ModelResult:
    curve = tuple(CurvePoint(flops=1e9 * (i + 1), loss=loss) for i, loss in enumerate(losses))
    return ModelResult(name, "run", "hf", 1_000, len(losses), 10, len(losses) * 10**9, 0, losses[-1], 2.0, 1.0, curve)


def test_one_line_a_method_and_the_zoom_holds_the_second_half() -> None:
    names = ("Pre-Train w/o KD", "Vanilla KD", "MiniPLM", "MiniPLM + Vanilla KD")
    students = tuple(result(name, [6.0, 5.0, 4.0 + i / 10, 3.0 + i / 10]) for i, name in enumerate(names))
    report = Report(
        "heldout",
        students,
        result("Pre-Train w/o KD", [6.0, 5.0, 4.0, 3.05]),
        result("Teacher", [2.5]),
        result("Reference", [5.0]),
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
