"""Selection against a literal sort on adversarial values, costs and groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.selection import top_values as selection
from megatron_kd.selection.top_values import Candidates, order_keys, select_at_least, select_within_budget

ADVERSARIAL = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, -3e38, 3e38, np.nan, 0.1, 0.2, 1 + 2**-23, 1 + 2**-22]
) | st.floats(width=32, allow_infinity=False)


def candidates(values: np.ndarray, costs: np.ndarray | None = None, groups: np.ndarray | None = None) -> Candidates:
    def slices(array):
        return None if array is None else lambda start, stop: array[start:stop]

    return Candidates(len(values), slices(values), slices(costs), slices(groups), 1 + max(groups, default=0)
                      if groups is not None else 1)  # fmt: skip


def literal(values, budgets, costs=None, groups=None) -> list[int]:
    """Sort, then take while it fits."""
    kept = []
    for group, budget in enumerate(budgets):
        mine = [i for i in range(len(values)) if not np.isnan(values[i]) and (groups is None or groups[i] == group)]
        mine.sort(key=lambda i: (-values[i], i))
        spent = 0
        for i in mine:
            spent += 1 if costs is None else costs[i]
            if spent > budget:
                break
            kept.append(i)
    return sorted(kept)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(selection, "BLOCK", 7)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_selection_on_adversarial_scores(data):
    values = np.array(data.draw(st.lists(ADVERSARIAL, min_size=1, max_size=60)), dtype=np.float32)
    n = len(values)
    costs = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=n, max_size=n).map(np.array))
    groups = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=n, max_size=n).map(np.array))
    number = 1 if groups is None else int(groups.max()) + 1
    budgets = data.draw(st.lists(st.integers(0, 80), min_size=number, max_size=number))
    kept = select_within_budget(candidates(values, costs, groups), budgets)
    assert np.flatnonzero(kept).tolist() == literal(values, budgets, costs, groups)


def test_a_stable_descending_sort_selects_the_same(monkeypatch):
    monkeypatch.setattr(selection, "BLOCK", 4096)
    for values in (
        np.random.default_rng(0).integers(0, 50, 20_000).astype(np.float32),
        np.random.default_rng(1).normal(0, 1, 20_000).astype(np.float32),
        np.random.default_rng(2).normal(1, 1e-6, 20_000).astype(np.float32),  # all in a few buckets
    ):
        for count in (0, 1, 7, 10_000, 19_999, 20_000, 30_000):
            expected = np.sort(np.argsort(-values, kind="stable")[:count])
            np.testing.assert_array_equal(np.flatnonzero(select_within_budget(candidates(values), [count])), expected)


def test_the_keys_order_as_the_values_do():
    values = np.array([-np.inf, -3e38, -1, -1e-45, 0, 1e-45, 1, 3e38, np.inf], dtype=np.float32)
    keys = order_keys(values).astype(np.int64)
    assert (np.diff(keys) > 0).all() and keys[0] > 0
    assert order_keys(np.array([-0.0, np.nan], np.float32)).tolist() == [keys[4], 0]


def test_a_threshold_keeps_equal_values_and_no_nan():
    values = np.array([0.1, np.nan, 0.3, 0.1, -5], dtype=np.float32)
    assert select_at_least(candidates(values), 0.1).tolist() == [True, False, True, True, False]


def test_a_large_budget_of_tokens_is_counted_exactly():
    """Costs that a float32 sum would round."""
    values = np.arange(100, dtype=np.float32)
    costs = np.full(100, 2**45 + 1)
    assert select_within_budget(candidates(values, costs), [50 * (2**45 + 1)]).sum() == 50
    assert select_within_budget(candidates(values, costs), [50 * (2**45 + 1) - 1]).sum() == 49
