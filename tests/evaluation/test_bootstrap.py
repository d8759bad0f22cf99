"""Intervals: equal to a plain loop, and to what is known of the mean."""

from __future__ import annotations

import math
import random
from statistics import fmean, median, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.evaluation.bootstrap import interval, resampled

_DRAW = random.Random(1)
ITEMS = [_DRAW.gauss(5, 2) for _ in range(400)]


def naive(items: list[float], count: int, seed: int) -> list[float]:
    """The same draws, spelled out."""
    draws = np.random.default_rng(seed).integers(0, len(items), size=(count, len(items)))
    found = []
    for row in range(count):
        total = 0.0
        for column in range(len(items)):
            total += items[int(draws[row][column])]
        found.append(total / len(items))
    return found


def test_the_mean_is_resampled_as_a_plain_loop_does() -> None:
    items = ITEMS[:20]
    found = resampled(items, fmean, count=30, seed=3)
    assert found.tolist() == pytest.approx(naive(items, 30, 3), rel=1e-12)


def test_any_aggregate_sees_the_same_draws_as_the_mean() -> None:
    items = ITEMS[:20]
    by_call = resampled(items, lambda rows: sum(rows) / len(rows), count=30, seed=3)
    assert by_call.tolist() == pytest.approx(resampled(items, fmean, count=30, seed=3).tolist())
    medians = resampled(items, median, count=30)
    assert set(medians) <= {median([a, b]) for a in items for b in items}


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    low, high = interval(resampled(ITEMS, fmean, count=4000))
    error = stdev(ITEMS) / math.sqrt(len(ITEMS))
    assert low == pytest.approx(fmean(ITEMS) - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(fmean(ITEMS) + 1.96 * error, abs=0.1 * error)


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    items = [1.0] * 60 + [0.0] * 140
    low, high = interval(resampled(items, fmean, count=4000))
    error = math.sqrt(0.3 * 0.7 / 200)
    assert (low, high) == pytest.approx((0.3 - 1.96 * error, 0.3 + 1.96 * error), abs=0.012)


def test_differences_are_paired() -> None:
    """A constant difference has no width, however wide the two intervals are."""
    a = resampled(ITEMS, fmean)
    b = resampled([x + 1 for x in ITEMS], fmean)
    assert interval(b - a) == pytest.approx([1.0, 1.0])
    low, high = interval(a)
    assert high - low > 0.3


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.integers(0, 5))
def test_resampled_means_lie_between_the_items(items: list[float], seed: int) -> None:
    low, high = interval(resampled(items, fmean, count=20, seed=seed))
    slack = 1e-9 * max(1.0, *map(abs, items))
    assert min(items) - slack <= low <= high <= max(items) + slack
    if len(set(items)) == 1:
        assert high - low <= slack
