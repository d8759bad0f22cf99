"""Byte budgets by layer, against trying every way to give the bytes out."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.tuning.budgets import Curve, allocate


@st.composite
def convex_curves(draw: st.DrawFn) -> Curve:
    """Points at costs 0, 1, 2, ..., whose error falls by less and less."""
    gains = sorted(draw(st.lists(st.integers(0, 20), min_size=1, max_size=4)), reverse=True)
    errors = [float(sum(gains[i:])) for i in range(len(gains) + 1)]
    return Curve(tuple(float(i) for i in range(len(errors))), tuple(errors))


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Any errors, at costs that ascend."""
    errors = draw(st.lists(st.floats(0, 20), min_size=1, max_size=5))
    steps = draw(st.lists(st.floats(0.5, 3), min_size=len(errors), max_size=len(errors)))
    return Curve(tuple(sum(steps[: i + 1]) for i in range(len(errors))), tuple(errors))


def total(given_curves: list[Curve], shares: list[float]) -> float:
    return sum(curve.at(share) for curve, share in zip(given_curves, shares, strict=True))


@given(st.lists(convex_curves(), min_size=1, max_size=3), st.integers(0, 12))
def test_convex_curves_get_the_least_total_error(found: list[Curve], budget: int) -> None:
    shares = allocate(found, budget)
    assert sum(shares) <= budget + 1e-9
    best = min(
        sum(curve.errors[point] for curve, point in zip(found, points, strict=True))
        for points in product(*(range(len(curve.costs)) for curve in found))
        if sum(points) <= budget
    )
    # Straight between whole points and a whole budget: no way in between is better.
    assert total(found, shares) == pytest.approx(best, abs=1e-9)


@given(st.lists(curves(), min_size=1, max_size=4), st.floats(0, 30))
def test_no_more_is_spent_than_there_is_and_no_layer_leaves_its_curve(
    found: list[Curve], extra: float
) -> None:
    least = sum(curve.costs[0] for curve in found)
    shares = allocate(found, least + extra)
    assert sum(shares) <= least + extra + 1e-9
    for curve, share in zip(found, shares, strict=True):
        assert curve.costs[0] <= share <= curve.costs[-1] + 1e-9


@given(curves())
def test_the_hull_is_convex_falls_and_lies_below(curve: Curve) -> None:
    hull = curve.hull()
    assert hull.costs[0] == curve.costs[0]
    slopes = [
        (hull.errors[i + 1] - hull.errors[i]) / (hull.costs[i + 1] - hull.costs[i])
        for i in range(len(hull.costs) - 1)
    ]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)
    for cost, error in zip(curve.costs, curve.errors, strict=True):
        assert hull.at(cost) <= error + 1e-9


@given(curves(), st.integers(1, 8))
def test_smoothing_keeps_the_points_that_were_measured(curve: Curve, steps: int) -> None:
    smooth = curve.smooth(steps)
    assert len(smooth.costs) == steps * (len(curve.costs) - 1) + 1
    for cost, error in zip(curve.costs, curve.errors, strict=True):
        assert smooth.at(cost) == pytest.approx(error, abs=1e-9)


def test_between_the_points_the_root_is_straight() -> None:
    assert Curve((0.0, 2.0), (4.0, 0.0)).smooth(2).at(1.0) == pytest.approx(1.0)


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(UserError, match=r"^5 bytes are too few: at least 6 are read"):
        allocate([Curve((2.0, 3.0), (1.0, 0.0)), Curve((4.0,), (1.0,))], 5)


@pytest.mark.parametrize(
    ("costs", "errors"),
    [((), ()), ((1.0, 1.0), (2.0, 1.0)), ((2.0, 1.0), (1.0, 0.0)), ((1.0,), ())],
)
def test_what_is_no_curve_is_a_callers_mistake(
    costs: tuple[float, ...], errors: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="cost"):
        Curve(costs, errors)
