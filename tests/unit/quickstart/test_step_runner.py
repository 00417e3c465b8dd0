"""Steps as real small processes: order, slots, skipping, resuming, failures; progress from metrics on disk."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_kd.quickstart.step_runner import (
    ProgressDisplay,
    Schedule,
    Step,
    StepFailed,
    StepRunner,
    describe,
    last_row,
    share_done,
    step_keys,
)


def python(name: str, code: str, folder: Path, **other) -> Step:
    """A step that runs ``code`` with OUT set to its output path and notes its start and end in ``events``."""
    output = folder / f"{name}.out"
    script = (
        f"from pathlib import Path\nimport time\nOUT = Path({str(output)!r})\n"
        f"def note(event):\n"
        f"    with open({str(folder / 'events')!r}, 'a') as f: f.write({name!r} + event + '\\n')\n"
        f"note('+')\n{code}\nnote('-')\n"
    )
    return Step(name, (sys.executable, "-S", "-c", script), outputs=(output,), **other)


def runner(steps: list[Step], folder: Path, processes: int = 2) -> StepRunner:
    return StepRunner(steps, state=folder / "state", logs=folder / "logs", processes=processes)


def events(folder: Path) -> list[str]:
    path = folder / "events"
    return path.read_text().split() if path.exists() else []


def test_a_step_waits_for_those_it_needs_and_two_run_at_a_time(tmp_path: Path) -> None:
    # a and b each wait for the other's start: only two at a time can finish.
    meet = "note(''); OUT.touch()\nwhile not OUT.with_name('{other}.out').exists(): time.sleep(0.01)"
    steps = [
        python("a", meet.format(other="b"), tmp_path),
        python("b", meet.format(other="a"), tmp_path),
        python("c", "OUT.write_text('x')", tmp_path, needs=("a", "b")),
    ]
    schedule = runner(steps, tmp_path).run()
    assert set(schedule.done) == {"a", "b", "c"} and not schedule.skipped
    order = events(tmp_path)
    assert order.index("c+") > max(order.index("a-"), order.index("b-"))


def test_one_slot_runs_one_at_a_time(tmp_path: Path) -> None:
    runner([python(name, "OUT.touch()", tmp_path) for name in "abc"], tmp_path, processes=1).run()
    assert sorted(events(tmp_path)) == ["a+", "a-", "b+", "b-", "c+", "c-"]
    assert [event[1] for event in events(tmp_path)] == ["+", "-"] * 3


def test_done_steps_are_skipped_until_something_changes(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("a: 1\n")

    def steps() -> list[Step]:
        return [
            python("a", "OUT.touch()", tmp_path, configs=(config,)),
            python("b", "OUT.touch()", tmp_path),
            python("c", "OUT.touch()", tmp_path, needs=("a",)),
        ]

    runner(steps(), tmp_path).run()
    (tmp_path / "events").unlink()
    assert runner(steps(), tmp_path).run().skipped == {"a", "b", "c"}
    assert events(tmp_path) == []
    config.write_text("a: 2\n")
    assert runner(steps(), tmp_path).run().skipped == {"b"}
    assert sorted(set(events(tmp_path))) == ["a+", "a-", "c+", "c-"]
    (tmp_path / "b.out").unlink()
    assert runner(steps(), tmp_path).run().skipped == {"a", "c"}


@pytest.mark.parametrize(("resumable", "content"), [(True, "half whole"), (False, "whole")])
def test_an_interrupted_step_continues_only_if_it_can(tmp_path: Path, resumable: bool, content: str) -> None:
    # The first run dies after writing half; the second appends to what is there.
    code = (
        "text = OUT.read_text() if OUT.exists() else ''\n"
        "if not Path({flag!r}).exists():\n"
        "    OUT.write_text('half '); Path({flag!r}).touch(); raise SystemExit(9)\n"
        "OUT.write_text(text + 'whole')"
    ).format(flag=str(tmp_path / "flag"))
    step = python("a", code, tmp_path, resumable=resumable)
    with pytest.raises(StepFailed):
        runner([step], tmp_path).run()
    runner([step], tmp_path).run()
    assert (tmp_path / "a.out").read_text() == content


def test_a_failure_shows_the_log_and_stops_the_others(tmp_path: Path) -> None:
    steps = [
        python("slow", "time.sleep(60)", tmp_path),
        python("bad", "[print('line', i) for i in range(100)]; raise SystemExit(3)", tmp_path),
        python("never", "OUT.touch()", tmp_path, needs=("bad",)),
    ]
    with pytest.raises(StepFailed, match="(?s)'bad' failed with exit status 3.*line 99") as failure:
        runner(steps, tmp_path).run()
    assert failure.value.status == 3 and "line 10\n" not in str(failure.value)
    assert "slow-" not in events(tmp_path) and "never+" not in events(tmp_path)
    assert json.loads((tmp_path / "state" / "bad.json").read_text())["seconds"] is None


def test_bad_input_of_a_step_is_one_line(tmp_path: Path) -> None:
    step = python("bad", "print('half'); print('train: no such dataset'); raise SystemExit(2)", tmp_path)
    with pytest.raises(StepFailed) as failure:
        runner([step], tmp_path).run()
    log = tmp_path / "logs" / "bad.log"
    assert str(failure.value) == f"step 'bad' stopped: train: no such dataset (its log: {log})"
    assert failure.value.status == 2


def test_a_step_without_its_output_has_failed(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="did not create .*a.out"):
        runner([python("a", "pass", tmp_path)], tmp_path).run()


def test_the_longest_chain_goes_first(tmp_path: Path) -> None:
    steps = [
        Step("short", ("x",), seconds=5),
        Step("head", ("x",), seconds=1),
        Step("tail", ("x",), needs=("head",), seconds=10),
    ]
    schedule = Schedule(steps)
    assert schedule.next_step().name == "head"
    schedule.running["head"] = 0.0
    assert schedule.next_step().name == "short"


def test_refuses_an_order_that_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"'a' comes twice, or before \['b'\]"):
        StepRunner([Step("a", ("x",), needs=("b",)), Step("b", ("x",))], state=Path(), logs=Path(), processes=1)


def test_keys_depend_on_those_of_needed_steps() -> None:
    before = step_keys([Step("a", ("x",)), Step("b", ("y",), needs=("a",)), Step("c", ("z",))])
    after = step_keys([Step("a", ("x2",)), Step("b", ("y",), needs=("a",)), Step("c", ("z",))])
    assert before["a"] != after["a"] and before["b"] != after["b"] and before["c"] == after["c"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_starts_stops_that_process_too(tmp_path: Path, monkeypatch, number: int) -> None:
    started = []

    def popen(*arguments, **options) -> subprocess.Popen:
        process = real(*arguments, **options)
        started.append(process)
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # Python handles it here, if at once
        return process

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            runner([python("a", "import time; time.sleep(60)", tmp_path)], tmp_path).run()
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert len(started) == 1 and started[0].returncode == -signal.SIGTERM


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
