"""The checks of single values, and what their refusals say."""

from __future__ import annotations

import math

import pytest

from coreinfer.errors import UserError, require_ratio, require_whole


@pytest.mark.parametrize("value", [1e-9, 0.4, 1, 1.0])
def test_ratios_pass_as_floats(value: float) -> None:
    assert require_ratio("beta", value) == value
    assert type(require_ratio("beta", value)) is float


@pytest.mark.parametrize("value", [0, 0.0, -1, 1.5, math.nan, math.inf, -math.inf, 10**400])
def test_ratios_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"^beta must be above 0 and at most 1, got ") as refusal:
        require_ratio("beta", value)
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize("value", ["0.4", None, True, [0.4], 1j])
def test_ratios_that_are_no_numbers_are_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"^beta must be a number above 0 and at most 1, got "):
        require_ratio("beta", value)


def test_zero_is_a_ratio_where_it_may_be() -> None:
    assert require_ratio("s", 0, zero_ok=True) == 0.0
    with pytest.raises(UserError, match=r"^s must be 0 to 1, got -0.1$"):
        require_ratio("s", -0.1, zero_ok=True)
    with pytest.raises(UserError, match=r"^s must be 0 to 1, got nan$"):
        require_ratio("s", math.nan, zero_ok=True)


@pytest.mark.parametrize("value", [0, 7, 10])
def test_whole_numbers_pass(value: int) -> None:
    assert require_whole("rank", value, 0, 10) == value


@pytest.mark.parametrize("value", ["3", 3.0, None, True, math.nan])
def test_what_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"^rank must be a whole number, at least 1, got "):
        require_whole("rank", value, 1)


def test_whole_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"^rank must be at least 1, got 0$"):
        require_whole("rank", 0, 1)
    with pytest.raises(UserError, match=r"^rank must be 1 to 5, got 6$"):
        require_whole("rank", 6, 1, 5)
