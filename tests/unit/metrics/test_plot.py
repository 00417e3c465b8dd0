"""Series over steps, tokens and FLOPs, smoothing, and the file itself."""

import json

import numpy as np
import pytest

from megatron_kd.config import from_mapping
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.metrics.plot import PlotConfig, figure_of, moving_mean, run, series


def rows(kd=0.0, steps=30):
    made = [
        {
            "step": s,
            "tokens": 10 * s,
            "train_flops": 1e9 * s,
            "loss": 5 / s + 2,
            "lm_loss": 5 / s + 2,
            "kd_loss": kd / s,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "tokens_per_second": 100.0 + s,
        }
        for s in range(1, steps + 1)
    ]
    return [*made, {"step": steps, "tokens": 10 * steps, "train_flops": 1e9 * steps, "eval_loss": 2.5}]


def write(folder, made):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(folder)


@pytest.mark.parametrize(("x", "factor"), [("steps", 1), ("tokens", 10), ("flops", 1e9)])
def test_series_over_each_axis(x, factor):
    places, values = series(rows(), x, "loss")
    assert places.tolist() == [factor * s for s in range(1, 31)] and values[0] == 7
    assert series(rows(), x, "eval_loss")[0].tolist() == [30 * factor]


def test_moving_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=40)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(40)]
    np.testing.assert_allclose(moving_mean(values, 7), expected)


def test_two_runs_in_one_figure(tmp_path, capsys):
    plain, distilled = write(tmp_path / "plain", rows()), write(tmp_path / "distilled", rows(kd=1.0))
    path = run(from_mapping(PlotConfig, {"runs": [plain, distilled], "output": str(tmp_path / "a/p.png")}, "test"))
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and str(path) in capsys.readouterr().out


def test_a_panel_that_no_run_fills_is_left_out():
    plain = figure_of({"a": rows()}, "steps", 5)
    both = figure_of({"a": rows(), "b": rows(kd=1.0)}, "flops", 5)
    titles = [axes.get_title() for axes in both.axes]
    assert any("distillation" in title for title in titles)
    assert not any("distillation" in axes.get_title() for axes in plain.axes)
    loss = both.axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "b"]
    assert "FLOPs" in loss.get_xlabel()


def test_a_run_that_lacks_a_term_leaves_its_panel_to_the_others():
    without = [{name: value for name, value in row.items() if name != "lm_loss"} for row in rows()]
    figure = figure_of({"without": without, "with": rows()}, "steps", 5)
    lm_term = next(axes for axes in figure.axes if "LM term" in axes.get_title())
    assert {line.get_label() for line in lm_term.get_lines() if not line.get_label().startswith("_")} == {"with"}


def test_what_it_refuses(tmp_path):
    with pytest.raises(ConfigError, match="at least one run folder"):
        from_mapping(PlotConfig, {}, "test")
    with pytest.raises(DataError, match="is not a run folder"):
        run(PlotConfig(runs=(str(tmp_path),)))
    empty = write(tmp_path / "empty", [])
    with pytest.raises(DataError, match="no training step"):
        run(PlotConfig(runs=(empty,)))
