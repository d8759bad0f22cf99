"""Exactly K neurons, and which ones."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.core.selection import neuron_budget, top_neurons
from coreinfer.errors import UserError

# Few values, so that the first key, and often the second, is tied.
KEYS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.5])), min_size=1, max_size=20
)


@given(KEYS, st.data())
def test_top_neurons_is_sorting_by_keys_then_index(
    rows: list[tuple[int, float]], data: st.DataObject
) -> None:
    budget = data.draw(st.integers(1, len(rows)))
    counts = torch.tensor([row[0] for row in rows])
    sums = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    best = sorted(range(len(rows)), key=lambda n: (-rows[n][0], -rows[n][1], n))
    chosen = top_neurons((counts, sums), budget)
    assert chosen.tolist() == sorted(best[:budget])
    assert chosen.dtype == torch.int32


@given(KEYS)
def test_budgets_nest(rows: list[tuple[int, float]]) -> None:
    counts = torch.tensor([row[0] for row in rows])
    sets = [set(top_neurons((counts,), k).tolist()) for k in range(1, len(rows) + 1)]
    assert all(small < large for small, large in pairwise(sets))


def test_all_neurons_tied_keeps_the_first() -> None:
    assert top_neurons((torch.zeros(6),), 4).tolist() == [0, 1, 2, 3]


def test_keeping_all_is_all() -> None:
    assert top_neurons((torch.randn(9),), 9).tolist() == list(range(9))


def test_counts_beyond_float32_are_told_apart() -> None:
    counts = torch.tensor([2**24, 2**24 + 1, 2**53, 2**53 + 1])
    assert top_neurons((counts,), 1).tolist() == [3]
    assert top_neurons((counts[:2],), 1).tolist() == [1]


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 20_000))
def test_budget_is_the_rounded_fraction(keep: float, size: int) -> None:
    wanted = round(keep * size)
    if wanted == 0:
        with pytest.raises(UserError, match=r"rounds to none; keep at least"):
            neuron_budget(keep, size)
    else:
        assert neuron_budget(keep, size) == wanted
        assert 1 <= wanted <= size


@pytest.mark.parametrize(
    ("keep", "size", "budget"),
    [(0.4, 1536, 614), (0.5, 5, 2), (0.5, 7, 4), (1.0, 1, 1), (0.6, 1, 1), (1.0, 11008, 11008)],
)
def test_budget_by_hand(keep: float, size: int, budget: int) -> None:
    assert neuron_budget(keep, size) == budget  # a half goes to the even neighbour


def test_the_budget_that_a_refusal_names_is_enough() -> None:
    with pytest.raises(UserError, match=r"keeping 0\.001 of 48 neurons.*at least 0\.02083"):
        neuron_budget(0.001, 48)
    assert neuron_budget(0.02083, 48) == 1


@pytest.mark.parametrize("keep", [0, 0.0, -0.4, 1.0001, 40, math.nan, math.inf, "0.4", None, True])
def test_a_fraction_out_of_range_is_refused(keep: object) -> None:
    with pytest.raises(UserError, match=r"above 0 and at most 1, got"):
        neuron_budget(keep, 100)  # type: ignore[arg-type]
