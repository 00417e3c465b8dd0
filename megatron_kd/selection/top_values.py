"""Select the largest of many values, exactly, in bounded memory: three passes over blocks, no sort, no copy.

A float32 is mapped to a uint32 of the same order. The first pass counts by the high 16 bits, the second by the low 16
bits within the bucket where the budget ends; that gives the last value kept. The third pass marks all values above it,
and the first ones equal to it. Time is linear; memory is one byte per value, and the counts.

Values: −0 equals 0, NaN is never kept, ties go to the lower index.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 1 << 22
_BINS = 1 << 16
Block = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Candidates:
    """The values to select from.

    Attributes:
        count: n.
        values: (start, stop) → float32 values.
        costs: (start, stop) → positive integers; None if each value costs 1.
        groups: (start, stop) → group numbers; None for a single group.
        num_groups: how many groups.
    """

    count: int
    values: Block
    costs: Block | None = None
    groups: Block | None = None
    num_groups: int = 1

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield intervals of at most ``BLOCK`` values that cover all."""
        for start in range(0, self.count, BLOCK):
            yield start, min(start + BLOCK, self.count)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return keys (see :func:`order_keys`), costs and groups of an interval; None where there are none."""
        costs = None if self.costs is None else np.asarray(self.costs(start, stop), dtype=np.float64)
        groups = None if self.groups is None else np.asarray(self.groups(start, stop), dtype=np.int64)
        return order_keys(self.values(start, stop)), costs, groups


def order_keys(values: np.ndarray) -> np.ndarray:
    """Map float32 values to uint32 keys of the same order: 0 for NaN, above 0 otherwise, equal for −0 and 0."""
    positive_zero = values.astype(np.float32) + np.float32(0)
    bits = positive_zero.view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys[np.isnan(positive_zero)] = 0
    return keys


def select_within_budget(candidates: Candidates, budgets: list[int]) -> np.ndarray:
    """Select the longest run of each group, from its largest value down, whose costs stay within the group's budget.

    Args:
        candidates: n of them.
        budgets: one for each group.

    Returns:
        which are kept, bool ``[n]``.
    """
    high = _count(candidates, lambda keys: keys >> np.uint32(16), None)
    buckets, left = zip(*(_find(high[g], budgets[g]) for g in range(candidates.num_groups)), strict=True)
    low = _count(candidates, lambda keys: keys & np.uint32(0xFFFF), np.array(buckets, dtype=np.int64))
    places, rests = zip(*(_find(low[g], left[g]) for g in range(candidates.num_groups)), strict=True)
    last = (np.maximum(np.array(buckets, dtype=np.int64), 0) << 16) | np.maximum(np.array(places, dtype=np.int64), 0)
    last[np.array(buckets) < 0] = 0  # the budget covers everything: keep all above NaN
    rest = np.where(np.array(buckets) < 0, 0.0, np.array(rests, dtype=np.float64))
    return _mark(candidates, last, rest)


def select_at_least(candidates: Candidates, threshold: float) -> np.ndarray:
    """Select the values of at least ``threshold``, bool ``[n]``; NaN is never selected."""
    kept = np.zeros(candidates.count, dtype=bool)
    for start, stop in candidates.blocks():
        kept[start:stop] = candidates.values(start, stop) >= np.float32(threshold)
    return kept


def _count(candidates: Candidates, part: Callable[[np.ndarray], np.ndarray], buckets: np.ndarray | None) -> np.ndarray:
    """Sum the costs per group and 16-bit part of the key, float64 ``[groups, 65536]`` (exact to 2^53).

    With ``buckets``, only keys whose high bits are their group's bucket count.
    """
    table = np.zeros((candidates.num_groups, _BINS))
    for start, stop in candidates.blocks():
        keys, costs, groups = candidates.read(start, stop)
        inside = keys > 0
        if buckets is not None:
            inside &= (keys >> np.uint32(16)) == (buckets[0] if groups is None else buckets[groups])
        cells = part(keys).astype(np.int64) if groups is None else groups * _BINS + part(keys)
        weights = None if costs is None else costs[inside]
        table += np.bincount(cells[inside], weights, minlength=table.size).reshape(table.shape)
    return table


def _find(costs: np.ndarray, budget: float) -> tuple[int, float]:
    """Return the highest bin that exceeds the budget, and the budget left when it is reached; −1 if all fit."""
    spent = np.cumsum(costs[::-1])
    over = int(np.searchsorted(spent, budget, side="right"))
    if over == len(costs):
        return -1, budget - spent[-1]
    return len(costs) - 1 - over, budget - (spent[over - 1] if over else 0)


def _mark(candidates: Candidates, last: np.ndarray, rests: np.ndarray) -> np.ndarray:
    """Mark keys above their group's ``last``, and the first ones equal to it while ``rests`` covers their cost."""
    kept = np.zeros(candidates.count, dtype=bool)
    spent, open_groups = np.zeros(len(last)), rests > 0
    for start, stop in candidates.blocks():
        keys, costs, groups = candidates.read(start, stop)
        limits = last[0] if groups is None else last[groups]
        chosen = keys > limits
        for group in np.flatnonzero(open_groups).tolist():
            tied = np.flatnonzero((keys == last[group]) & (keys > 0) & (True if groups is None else groups == group))
            if not len(tied):
                continue
            totals = spent[group] + np.cumsum(np.ones(len(tied)) if costs is None else costs[tied])
            taken = int(np.searchsorted(totals, rests[group], side="right"))
            chosen[tied[:taken]] = True
            spent[group] = totals[-1]
            open_groups[group] = taken == len(tied)
        kept[start:stop] = chosen
    return kept
