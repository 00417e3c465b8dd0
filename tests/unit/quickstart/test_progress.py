"""The progress line from metrics files on disk."""

import io
import json
import time
from pathlib import Path

from megatron_kd.quickstart.step_runner import ProgressDisplay, Schedule, Step, describe, last_row, share_done


def write_metrics(run: Path, rows: list[dict], tail: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return run


def test_last_row_skips_evaluations_and_a_line_cut_short(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 5 - step / 100, "padding": "x" * 200} for step in range(1, 101)]
    run = write_metrics(tmp_path / "run", [*rows, {"step": 100, "eval_loss": 4.0}], '{"step": 101, "lo')
    assert last_row(run)["step"] == 100 and last_row(run)["loss"] == 4.0
    assert last_row(tmp_path / "none") is None
    assert last_row(write_metrics(tmp_path / "empty", [])) is None


def test_share_comes_from_the_metrics(tmp_path: Path) -> None:
    run = write_metrics(tmp_path / "run", [{"step": 25, "loss": 4.5}])
    step = Step("student", ("x",), metrics=(run, 100), seconds=40)
    schedule = Schedule([step], running={"student": time.monotonic()})
    assert share_done(step, schedule) == 0.25
    assert describe(step) == "student 25/100 loss 4.50"
    assert share_done(step, Schedule([step])) == 0.0
    assert share_done(step, Schedule([step], done={"student": 3.0})) == 1.0
    plain = Step("score", ("x",), seconds=10)
    assert share_done(plain, Schedule([plain], running={"score": time.monotonic() - 100})) == 0.95


def test_status_counts_only_this_runs_work_for_the_eta(tmp_path: Path) -> None:
    steps = [Step("old", ("x",), seconds=50), Step("new", ("x",), seconds=25), Step("later", ("x",), seconds=25)]
    display = ProgressDisplay(io.StringIO())
    display._started -= 10  # ten seconds for 'new', so 'later' takes ten more
    status = display.status(Schedule(steps, done={"old": 1.0, "new": 10.0}, skipped={"old"}))
    assert status.startswith("[2/3]  75% 0:10 left")


def test_lines_off_a_terminal_and_on_one(tmp_path: Path) -> None:
    schedule = Schedule([Step("a", ("x",)), Step("b", ("x",))], done={"a": 3.2}, running={"b": time.monotonic()})
    plain = io.StringIO()
    ProgressDisplay(plain)(schedule)
    assert plain.getvalue() == "  a: 3 s\n"
    terminal = io.StringIO()
    display = ProgressDisplay(terminal, width=60)
    display(schedule)
    display.finish()
    assert all(len(part) <= 60 for part in terminal.getvalue().replace("\n", "\r").split("\r"))
    assert "[1/2]" in terminal.getvalue() and terminal.getvalue().endswith("\r")
