"""``metrics.jsonl``: one row a step, over interruptions too."""

import json

import pytest

from megatron_kd.metrics.tracker import METRICS_NAME, RunTracker, read_metrics


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
    assert "held-out loss 3.0000 nats a token, 1.5000 bits a byte" in capsys.readouterr().err


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
