"""Where a run's curve reaches another's final loss."""

import json
import math

import pytest

from megatron_kd.evaluation.compute_saving import flops_to_reach, main, saving

BASELINE = [(1e18, 4.0), (1e19, 3.5), (1e20, 3.0)]


def test_between_two_evaluations_in_log_flops():
    assert flops_to_reach([(1e18, 4.0), (1e20, 2.0)], 3.0) == pytest.approx(1e19)
    assert flops_to_reach([(1e18, 2.0)], 3.0) == 1e18
    assert flops_to_reach([(1e18, 4.0), (1e20, 3.1)], 3.0) is None


def test_a_run_that_learns_twice_as_fast_saves_half():
    twice = [(flops / 2, loss) for flops, loss in BASELINE]
    assert saving(BASELINE, twice) == pytest.approx(2.0)
    assert saving(BASELINE, BASELINE) == pytest.approx(1.0)
    assert saving(BASELINE, [(f, v + 0.5) for f, v in BASELINE]) is None
    law = [(10.0**e, 3 + math.exp(-e / 4)) for e in range(16, 21)]
    assert 1 < saving(law, [(f / 3, v) for f, v in law]) == pytest.approx(3.0)


def test_the_command(tmp_path, capsys):
    for name, factor in (("plain", 1.0), ("faster", 0.5)):
        (tmp_path / name).mkdir()
        rows = [{"step": 1, "eval_loss": loss, "train_flops": flops * factor} for flops, loss in BASELINE]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(tmp_path / "plain"), str(tmp_path / "faster")]) == 0
    assert "needs 0.50 of the FLOPs (2.00 x less)" in capsys.readouterr().out
    assert main([str(tmp_path / "plain"), str(tmp_path)]) == 2 and main([]) == 2
