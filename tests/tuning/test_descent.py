"""Descent of the budgets on losses that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coreinfer.core.layer_errors import LayerErrors
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.descent import descend
from coreinfer.tuning.design import Design, Planner, Profile
from coreinfer.tuning.goal import Goal
from coreinfer.tuning.tuner import Tuner
from tests.tuning.fakes import LAYERS, NEURONS, PRICES, WORTH, Formula, loss_of, objective

LEVEL = LayerErrors((0.5, 1.0), torch.tensor([[0.25, 0.0]] * LAYERS).double())
PLANNER = Planner(PRICES, LEVEL)
SHARE = 0.6
STEPS = 40
START = Design("impact", profile=Profile(spread=1.0))


def candidate(design: Design) -> Candidate:
    return PLANNER.candidate(design, SHARE)


class Worths:
    """The formula's slopes, off by a factor that differs from step to step and layer to layer."""

    def __init__(self, noise: float = 0.0) -> None:
        self.asked: list[Design] = []
        self.generator = torch.Generator().manual_seed(0)
        self.noise = noise

    def __call__(self, number: int, design: Design) -> list[float | None]:
        assert number == len(self.asked)
        self.asked.append(design)
        factors = 1 + self.noise * torch.randn(LAYERS, generator=self.generator)
        keeps = candidate(design).keeps
        slopes = [2 * w * (1 - k) / NEURONS for w, k in zip(WORTH, keeps, strict=True)]
        return [
            None if keep == 1.0 else slope * float(factor)
            for slope, keep, factor in zip(slopes, keeps, factors, strict=True)
        ]


def least() -> float:
    known = [[w * 0.25, 0.0] for w in WORTH]
    planner = Planner(PRICES, LayerErrors((0.5, 1.0), torch.tensor(known).double()))
    return loss_of(planner.candidate(START, SHARE))


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_errors_that_knew_nothing_are_put_right(noise: float) -> None:
    """Single-layer errors that are all alike; the loss knows that layers differ forty-fold."""
    before = loss_of(candidate(START))
    after = loss_of(candidate(descend(START, LAYERS, Worths(noise), STEPS)))
    assert least() <= after + 1e-6
    assert after - least() < 0.15 * (before - least())


def test_the_best_budgets_stay() -> None:
    """Where a byte is worth the same in every layer, nothing moves."""

    def same(_number: int, _design: Design) -> list[float]:
        return [0.01] * LAYERS

    for moved in ("weights", "active_weights"):
        found = descend(START, LAYERS, same, STEPS, moved)
        assert candidate(found) == candidate(START)


def test_every_step_reads_the_same_bytes() -> None:
    worths = Worths(0.5)
    descend(START, LAYERS, worths, STEPS)
    read = {sum(PRICES.read(candidate(design))) for design in worths.asked}
    assert len(worths.asked) == STEPS
    assert max(read) - min(read) <= 1200 * LAYERS


def test_dense_layers_are_not_moved() -> None:
    found = descend(
        replace(START, profile=Profile(first=2, last=1, spread=1.0)), LAYERS, Worths(), STEPS
    )
    assert not any(found.profile.weights[i] for i in (0, 1, LAYERS - 1))
    assert any(found.profile.weights)


@pytest.mark.parametrize("rank", [0, 4, 8, 15])
def test_where_all_is_kept_activity_descends(rank: int) -> None:
    """Whatever the stand-in would read if one were needed; and all stays kept."""
    stand_in, fit = ("linear", {"rank": rank}) if rank else ("none", {})
    start = Design("impact", {"active": 0.5}, stand_in, fit)
    tuner = Tuner(Goal.of_bytes(0.7), PLANNER, objective(Formula()))
    before = PLANNER.candidate(start, 0.7)
    assert set(before.keeps) == {1.0}
    after = PLANNER.candidate(tuner.descended(start, 0.7, STEPS), 0.7)
    assert set(after.keeps) == {1.0}
    assert loss_of(after) < 0.75 * loss_of(before)
    assert abs(sum(PRICES.read(after)) - sum(PRICES.read(before))) < 2000 * LAYERS
    # Skipping costs most in the last two layers, and hardly anything in the second.
    assert min(after.active(6), after.active(7)) > max(before.actives) > 0.2 > after.active(1)


def test_what_cannot_be_weighed_is_left() -> None:
    assert descend(START, LAYERS, lambda _number, _design: None, STEPS) == START
    assert descend(START, LAYERS, lambda _number, _design: [None] * LAYERS, STEPS) == START
    assert descend(START, LAYERS, lambda _number, _design: [-0.1] * LAYERS, STEPS) == START
    assert descend(START, LAYERS, Worths(), 0) == START
