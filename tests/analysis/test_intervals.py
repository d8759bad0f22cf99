"""Intervals against scipy and against the plain way of computing them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coreinfer.analysis.intervals import Estimate, difference, mean, pair_correlation

NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=20)


def symmetric(count: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, count))
    return (values + values.T) / 2


def pairs_of(matrix: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    i, j = np.triu_indices(len(matrix), k=1)
    chosen = np.ones(len(i), dtype=bool) if counted is None else counted[i, j]
    return matrix[i, j][chosen]


@given(NUMBERS)
def test_a_mean_has_students_interval(values: list[float]) -> None:
    found = mean(values)
    assert found.value == pytest.approx(np.mean(values))
    error = stats.sem(values)
    assert found.low is not None
    assert found.high is not None
    if error == 0:
        assert found.low == pytest.approx(found.high)
        return
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_one_value_has_no_interval() -> None:
    assert mean([3.0]) == Estimate(3.0, None, None)
    assert str(mean([3.0])) == "3.00"


def test_a_difference_is_taken_pair_by_pair() -> None:
    a, b = [1.0, 2.0, 30.0], [0.5, 1.5, 29.5]
    found = difference(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="zip"):
        difference(a, b[:2])


@pytest.mark.parametrize("seed", range(5))
def test_a_correlation_over_pairs_is_pearsons(seed: int) -> None:
    x = symmetric(9, seed)
    y = x + symmetric(9, seed + 100)
    expected = stats.pearsonr(pairs_of(x), pairs_of(y)).statistic
    assert pair_correlation(x, y).value == pytest.approx(expected)
    groups = np.arange(9) % 2
    counted = groups[:, None] == groups[None, :]
    expected = stats.pearsonr(pairs_of(x, counted), pairs_of(y, counted)).statistic
    assert pair_correlation(x, y, counted).value == pytest.approx(expected)


def test_the_interval_is_the_bootstrap_over_items_done_plainly() -> None:
    x = symmetric(7, 1)
    y = x + symmetric(7, 2)
    found = pair_correlation(x, y, seed=5)
    generator = np.random.default_rng(5)
    values = []
    for weights in generator.multinomial(7, np.full(7, 1 / 7), size=1000):
        items = [i for i, times in enumerate(weights) for _ in range(times)]
        pairs = [
            (x[a, b], y[a, b])
            for place, a in enumerate(items)
            for b in items[:place]
            if a != b  # a copy of an item is no other item
        ]
        if len(set(pairs)) > 1:
            values.append(np.corrcoef(np.array(pairs).T)[0, 1])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_the_interval_is_seeded_and_holds_the_value() -> None:
    x, y = symmetric(20, 3), symmetric(20, 4)
    a, b = pair_correlation(x, x + y, seed=1), pair_correlation(x, x + y, seed=1)
    assert a == b != pair_correlation(x, x + y, seed=2)
    assert a.low is not None
    assert a.high is not None
    assert a.low < a.value < a.high


def test_what_does_not_vary_has_no_correlation() -> None:
    found = pair_correlation(np.ones((5, 5)), symmetric(5, 0))
    assert math.isnan(found.value)
    assert found.low is None


def test_the_diagonal_is_not_looked_at() -> None:
    x, y = symmetric(6, 1), symmetric(6, 2)
    changed = x.copy()
    np.fill_diagonal(changed, 1e6)
    assert pair_correlation(changed, y).value == pytest.approx(pair_correlation(x, y).value)
