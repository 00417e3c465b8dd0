"""The largest of many values, exactly, in bounded memory: three passes over blocks, no sort and no copy of the values.

A float32 is turned into a uint32 of the same order. The first pass counts the high 16 bits, the second the low 16 bits
inside the one bucket where the budget ends; that gives the last value kept. The third pass marks everything above it,
and of those equal to it the first ones. Cost: linear; memory: one byte a value and the counts.

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
    """What is chosen from.

    Attributes:
        count: n.
        values: (start, stop) → float32 values.
        costs: (start, stop) → positive integers; None where each counts as one.
        groups: (start, stop) → group numbers; None for a single group.
        num_groups: how many groups.
    """

    count: int
    values: Block
    costs: Block | None = None
    groups: Block | None = None
    num_groups: int = 1

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Intervals of at most ``BLOCK`` values that cover all."""
        for start in range(0, self.count, BLOCK):
            yield start, min(start + BLOCK, self.count)

    def _keys(self, start: int, stop: int) -> np.ndarray:
        return order_keys(self.values(start, stop))

    def _costs(self, start: int, stop: int) -> np.ndarray | None:
        return None if self.costs is None else np.asarray(self.costs(start, stop), dtype=np.float64)

    def _groups(self, start: int, stop: int) -> np.ndarray | None:
        return None if self.groups is None else np.asarray(self.groups(start, stop), dtype=np.int64)


def order_keys(values: np.ndarray) -> np.ndarray:
    """uint32 keys in the order of float32 values: 0 for NaN, above 0 for everything else, equal for −0 and 0."""
    positive_zero = values.astype(np.float32) + np.float32(0)
    bits = positive_zero.view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys[np.isnan(positive_zero)] = 0
    return keys


def select_within_budget(candidates: Candidates, budgets: list[int]) -> np.ndarray:
    """The longest run of each group, from its largest value down, whose costs add up to at most the group's budget.

    Args:
        candidates: n of them.
        budgets: one a group.

    Returns:
        bool ``[n]``, which are kept.
    """
    high = _count(candidates, lambda keys: keys >> np.uint32(16), None)
    buckets, left = zip(*(_find(high[g], budgets[g]) for g in range(candidates.num_groups)), strict=True)
    low = _count(candidates, lambda keys: keys & np.uint32(0xFFFF), np.array(buckets, dtype=np.int64))
    places, rests = zip(*(_find(low[g], left[g]) for g in range(candidates.num_groups)), strict=True)
    last = (np.maximum(np.array(buckets, dtype=np.int64), 0) << 16) | np.maximum(np.array(places, dtype=np.int64), 0)
    last[np.array(buckets) < 0] = 0  # the budget covers everything: keep all above NaN
    rests = [0 if bucket < 0 else rest for bucket, rest in zip(buckets, rests, strict=True)]
    return _mark(candidates, last, np.array(rests, dtype=np.float64))


def select_at_least(candidates: Candidates, threshold: float) -> np.ndarray:
    """Which values are at least ``threshold``, bool ``[n]``; NaN is not."""
    kept = np.zeros(candidates.count, dtype=bool)
    for start, stop in candidates.blocks():
        kept[start:stop] = candidates.values(start, stop) >= np.float32(threshold)
    return kept


def _count(candidates: Candidates, part: Callable[[np.ndarray], np.ndarray], buckets: np.ndarray | None) -> np.ndarray:
    """Costs per group and 16-bit part of the key, float64 ``[groups, 65536]`` (exact to 2^53).

    With ``buckets``, only of keys whose high bits are their group's bucket.
    """
    table = np.zeros((candidates.num_groups, _BINS))
    for start, stop in candidates.blocks():
        keys, costs, groups = (f(start, stop) for f in (candidates._keys, candidates._costs, candidates._groups))
        inside = keys > 0
        if buckets is not None:
            inside &= (keys >> np.uint32(16)) == (buckets[0] if groups is None else buckets[groups])
        cells = part(keys).astype(np.int64) if groups is None else groups * _BINS + part(keys)
        weights = None if costs is None else costs[inside]
        table += np.bincount(cells[inside], weights, minlength=table.size).reshape(table.shape)
    return table


def _find(costs: np.ndarray, budget: float) -> tuple[int, float]:
    """The highest bin that does not fit any more, and the budget left when it is reached; −1 if all fit."""
    spent = np.cumsum(costs[::-1])
    over = int(np.searchsorted(spent, budget, side="right"))
    if over == len(costs):
        return -1, budget - spent[-1]
    return len(costs) - 1 - over, budget - (spent[over - 1] if over else 0)


def _mark(candidates: Candidates, last: np.ndarray, rests: np.ndarray) -> np.ndarray:
    """Keys above ``last`` of their group, and of those equal to it the first ones while ``rests`` covers their cost."""
    kept = np.zeros(candidates.count, dtype=bool)
    spent, open_groups = np.zeros(len(last)), rests > 0
    for start, stop in candidates.blocks():
        keys, costs, groups = (f(start, stop) for f in (candidates._keys, candidates._costs, candidates._groups))
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
