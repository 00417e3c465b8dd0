"""The report's figures and examples against numpy, on values with ties, NaN and more than one block."""

import numpy as np
import pytest

from megatron_kd.selection import selection_report
from megatron_kd.selection.differences import Differences
from megatron_kd.selection.selection_report import example_chunks, selection_facts


def of(values: np.ndarray) -> Differences:
    values = np.asarray(values, dtype=np.float32)
    return Differences(lambda start, stop: values[start:stop], [])


def literal(values: np.ndarray, distance: np.ndarray, each: int) -> list[int]:
    order = np.argsort(np.where(np.isnan(values), np.inf, distance), kind="stable")
    return [int(index) for index in order[:each] if not np.isnan(values[index])]


@pytest.mark.parametrize("block", [7, 1 << 22])
@pytest.mark.parametrize("kind", ["ties before the best", "random", "all equal", "nan"])
def test_examples_are_the_outermost_and_the_middle(monkeypatch: pytest.MonkeyPatch, block: int, kind: str) -> None:
    monkeypatch.setattr(selection_report, "BLOCK", block)
    generator = np.random.default_rng(4)
    values = {
        "ties before the best": np.array([1.0] * 50 + [2.0, 3.0, -1.0, -2.0]),
        "random": generator.integers(-9, 9, 60) / 4,
        "all equal": np.full(20, 0.25),
        "nan": np.where(generator.random(40) < 0.5, np.nan, generator.normal(size=40)),
    }[kind].astype(np.float32)
    found = example_chunks(of(values), len(values), 3)
    middle = np.float32(np.nanmedian(values))
    assert found == {
        "top": literal(values, -values, 3),
        "middle": literal(values, np.abs(values - middle), 3),
        "bottom": literal(values, values, 3),
    }


def test_no_examples_and_no_scores() -> None:
    assert example_chunks(of(np.ones(4)), 4, 0) == {}
    assert example_chunks(of(np.full(4, np.nan)), 4, 2) == {"top": [], "middle": [], "bottom": []}


@pytest.mark.parametrize("block", [9, 1 << 22])
def test_figures(monkeypatch: pytest.MonkeyPatch, dataset, block: int) -> None:
    monkeypatch.setattr(selection_report, "BLOCK", block)
    values = np.linspace(-1, 2, len(dataset)).astype(np.float32)
    values[[3, 17]] = np.nan
    kept = np.array([20, 30, 31, 39])
    facts = selection_facts(dataset, of(values), kept)
    assert (facts["chunks"], facts["kept"], facts["unscored"]) == (40, 4, 2)
    assert facts["threshold"] == values[20] and "domains" not in facts
    assert facts["share_negative"] == pytest.approx((values < 0).sum() / 38)
    assert facts["mean_all"] == pytest.approx(np.nanmean(values)) and facts["mean_kept"] == values[kept].mean()


def test_shares_by_domain() -> None:
    names, domains = ["a", "b", "never"], np.array([0, 1, 0, 1, 1], np.uint16)
    rows = selection_report.domain_shares(names, domains, of(np.array([1, 2, np.nan, 4, 6])), np.array([1, 4]))
    assert [tuple(row.values()) for row in rows] == [("a", 2, 0, 0, 1), ("b", 3, 2, 2 / 3, 4), ("never", 0, 0, 0, 0)]
