"""Refinement on losses that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.core.layer_errors import LayerErrors
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.design import Design, Planner, Profile
from coreinfer.tuning.refine import in_groups, refine
from tests.tuning.fakes import LAYERS, PRICES, WORTH, loss_of

LEVEL = LayerErrors((0.5, 1.0), torch.tensor([[0.25, 0.0]] * LAYERS).double())
PLANNER = Planner(PRICES, LEVEL)
SHARE = 0.6
START = Design("impact", profile=Profile(spread=1.0))


class Losses:
    """The formula's, at one share; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Design] = []

    def __call__(self, designs: Sequence[Design]) -> list[float | None]:
        self.asked += designs
        return [loss_of(candidate(design)) for design in designs]


def candidate(design: Design) -> Candidate:
    return PLANNER.candidate(design, SHARE)


def test_errors_that_knew_nothing_are_put_right() -> None:
    """Single-layer errors that are all alike; the loss knows that layers differ forty-fold."""
    before = loss_of(candidate(START))
    after = loss_of(candidate(refine(START, LAYERS, Losses(), 4)))
    known = [[w * 0.25, 0.0] for w in WORTH]
    best = Planner(PRICES, LayerErrors((0.5, 1.0), torch.tensor(known).double()))
    least = loss_of(best.candidate(START, SHARE))
    assert least < after < before
    assert after - least < 0.25 * (before - least)


def test_it_never_gets_worse_and_returns_the_best_that_was_measured() -> None:
    for rounds in range(4):
        losses = Losses()
        found = refine(START, LAYERS, losses, rounds)
        tried = [loss_of(candidate(design)) for design in losses.asked]
        assert loss_of(candidate(found)) == min(tried, default=loss_of(candidate(START)))


def test_every_move_reads_the_same_bytes() -> None:
    losses = Losses()
    refine(START, LAYERS, losses, 2)
    read = {PRICES.read(candidate(design).keeps, 0) for design in losses.asked}
    assert len(losses.asked) > 20
    assert max(read) - min(read) <= 12 * LAYERS


def test_layers_that_stay_dense_are_not_moved() -> None:
    losses = Losses()
    refine(replace(START, profile=Profile(first=2, last=1, spread=1.0)), LAYERS, losses, 1)
    for design in losses.asked[1:]:
        assert not any(design.profile.weights[i] for i in (0, 1, LAYERS - 1))


def test_what_cannot_be_measured_is_passed_over() -> None:
    def nothing(designs: Sequence[Design]) -> list[float | None]:
        return [None for _ in designs]

    assert refine(START, LAYERS, nothing, 3) == START

    def flat(designs: Sequence[Design]) -> list[float | None]:
        return [1.0 for _ in designs]

    assert refine(START, LAYERS, flat, 3) == START


@given(st.integers(1, 60), st.integers(1, 20))
def test_groups_are_a_partition(layers: int, count: int) -> None:
    groups = in_groups(range(layers), count)
    assert [layer for group in groups for layer in group] == list(range(layers))
    sizes = [len(group) for group in groups]
    assert len(sizes) == min(count, layers)
    assert max(sizes) - min(sizes) <= 1
