"""``metrics.jsonl``: one row per step, across interruptions; the console line."""

import json

import pytest

from megatron_kd.errors import DataError
from megatron_kd.metrics.tracker import METRICS_NAME, RunTracker, console_line, read_evaluations, read_metrics


def row(step):
    return {"step": step, "loss": 1.0 / step, "tokens_per_second": 10.0}


def record(folder, steps, first_step=0, active=True):
    tracker = RunTracker(folder, total_steps=10, first_step=first_step, active=active, description="test")
    for step in steps:
        tracker.step(row(step))
    return tracker


def test_rows_come_back(tmp_path, capsys):
    tracker = record(tmp_path, [1, 2])
    tracker.evaluation({"step": 2, "eval_loss": 3.0, "bits_per_byte": 1.5})
    assert len(read_metrics(tmp_path)) == 3, "a row is in the file as soon as it is recorded"
    tracker.flush()
    tracker.close()
    assert read_metrics(tmp_path) == [row(1), row(2), {"step": 2, "eval_loss": 3.0, "bits_per_byte": 1.5}]
    assert "held-out loss 3.0000 nats per token, 1.5000 bits per byte" in capsys.readouterr().err


def test_rows_beyond_the_resumed_step_are_dropped(tmp_path):
    tracker = record(tmp_path, [1, 2, 3, 4, 5])
    tracker.evaluation({"step": 4, "eval_loss": 3.0, "bits_per_byte": 1.5})
    tracker.close()
    record(tmp_path, [4, 5], first_step=3).close()
    assert [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()] == list(
        map(row, range(1, 6))
    )


def test_a_run_that_starts_over_drops_all(tmp_path):
    record(tmp_path, [1, 2]).close()
    record(tmp_path, [1]).close()
    assert read_metrics(tmp_path) == [row(1)]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_that_a_kill_cut_short(tmp_path, cut):
    record(tmp_path, [1, 2, 3]).close()
    path = tmp_path / METRICS_NAME
    path.write_text(path.read_text()[: -1 - cut])
    assert read_metrics(tmp_path) == [row(1), row(2)]
    record(tmp_path, [3, 4], first_step=2).close()
    assert read_metrics(tmp_path) == [row(step) for step in (1, 2, 3, 4)]
    assert path.read_text().endswith("}\n")


def test_other_ranks_write_nothing(tmp_path, capsys):
    tracker = record(tmp_path, [1], active=False)
    tracker.evaluation({"step": 1})
    tracker.flush()
    tracker.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_a_figure_that_is_not_a_number_is_a_fault(tmp_path):
    tracker = record(tmp_path, [])
    with pytest.raises(ValueError):
        tracker.step({**row(1), "loss": float("nan")})
    tracker.close()


def test_evaluations_of_a_run(tmp_path):
    tracker = record(tmp_path, [1, 2])
    with pytest.raises(DataError, match="has no evaluation"):
        read_evaluations(tmp_path)
    tracker.evaluation({"step": 2, "eval_loss": 3.0, "bits_per_byte": 1.5})
    tracker.close()
    assert [evaluated["eval_loss"] for evaluated in read_evaluations(tmp_path)] == [3.0]
    with pytest.raises(DataError, match="is not a run folder"):
        read_metrics(tmp_path / "none")


FULL_ROW = {
    "step": 3,
    "loss": 3.25,
    "lm_loss": 3.5,
    "kd_loss": 3.0,
    "grad_norm": 1.234,
    "learning_rate": 3e-4,
    "tokens_per_second": 123456.0,
    "tflops_per_second": 412.3,
    "mfu": 0.417,
    "memory_bytes": 3 * 2**30,
}


def test_the_console_line_names_every_figure():
    assert console_line(FULL_ROW) == (
        "loss 3.2500, lm 3.5000 kd 3.0000, grad 1.23, lr 3.00e-04, 123,456 tokens/s, 412 TFLOP/s, MFU 41.7%, 3.0 GiB"
    )


def test_the_console_line_leaves_out_what_a_row_does_not_have():
    row = {name: value for name, value in FULL_ROW.items() if name not in ("mfu", "kd_loss")}
    line = console_line({**row, "kd_loss": 0.0})
    assert "kd" not in line and "MFU" not in line and "loss 3.2500" in line
