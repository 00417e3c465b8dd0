"""The verb: run folders, a CSV, given coefficients; what it writes and refuses."""

import json

import numpy as np
import pytest

from megatron_kd.config import from_mapping
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.evaluation.fit_scaling_law import FitScalingLawConfig, ScalingLaw, run

LAW = ScalingLaw(2.73e8, 0.45, 3.06)
FLOPS = np.geomspace(1e18, 1e20, 10)


def config(tmp_path, **keys):
    return from_mapping(FitScalingLawConfig, {"output": str(tmp_path / "law"), **keys}, "test")


def test_a_csv_with_two_runs(tmp_path, capsys):
    rows = [f"{c},{LAW.loss(c) + shift},{name}" for name, shift in (("plain", 0.0), ("kd", -0.1)) for c in FLOPS]
    (tmp_path / "p.csv").write_text("flops,loss,name\n" + "\n".join(rows))
    figures = run(config(tmp_path, csv=str(tmp_path / "p.csv"), parameters=5e8))
    assert figures["kd"]["floor"] == pytest.approx(2.96, abs=1e-4)
    assert figures["plain"]["extrapolation"]["1T"]["flops"] == pytest.approx(3.146e21, rel=1e-3)
    assert figures["plain"]["extrapolation"]["1T"]["loss"] == pytest.approx(3.12, abs=0.01)
    assert json.loads((tmp_path / "law/scaling_law.json").read_text()) == json.loads(json.dumps(figures))
    assert (tmp_path / "law/scaling_law.png").read_bytes()[:4] == b"\x89PNG"
    assert "times the largest run" in capsys.readouterr().out


def test_evaluations_of_a_run_without_its_warm_up(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": 0, "eval_loss": 9.0, "train_flops": 1e16}]
    rows += [{"step": i, "eval_loss": LAW.loss(c), "train_flops": c} for i, c in enumerate(np.linspace(1e19, 1e20, 12))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = run(config(tmp_path, runs=[str(folder)], parameters=5e8))[str(folder)]
    assert figures["points"] == 12 and figures["floor"] == pytest.approx(3.06, abs=1e-4)


def test_given_coefficients(tmp_path, capsys):
    figures = run(config(tmp_path, amplitude=2.73e8, alpha=0.45, floor=3.06, parameters=5e8))["given"]
    assert figures["extrapolation"]["10T"]["loss"] == pytest.approx(3.08, abs=0.01)
    assert figures["standard_errors"] is None and "10T tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give run folders"),
        ({"alpha": 0.4}, "go together"),
        ({"csv": "x"}, "'parameters'"),
        ({"csv": "x", "runs": ["y"], "parameters": 1}, "give run folders"),
    ],
)
def test_what_it_refuses(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **keys)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        run(config(tmp_path, csv=str(tmp_path / "none.csv"), parameters=1))
    (tmp_path / "bad.csv").write_text("flops,losses\n1,2\n")
    with pytest.raises(DataError, match="columns 'flops' and 'loss'"):
        run(config(tmp_path, csv=str(tmp_path / "bad.csv"), parameters=1))
    with pytest.raises(DataError, match="is not a run folder"):
        run(config(tmp_path, runs=[str(tmp_path)]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    with pytest.raises(DataError, match="has no evaluation"):
        run(config(tmp_path, runs=[str(tmp_path)]))
