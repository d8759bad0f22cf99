"""Designs become candidates that read what they may, and no more."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.core.layer_errors import LayerErrors
from coreinfer.core.measures import ReadCost
from coreinfer.errors import UserError
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.design import Design, Planner, Profile
from coreinfer.tuning.prices import LEAST_SKIPPED, MORE_ACTIVE, Prices


def planner(sizes: list[int], scales: list[float], width: int = 1) -> Planner:
    per_neuron = tuple((6 + i % 2) * width for i in range(len(sizes)))
    cost = ReadCost(100, per_neuron, tuple(sizes), tuple(size - width for size in per_neuron))
    keeps = (0.25, 0.5, 1.0)
    errors = [[scale * (1 - keep) ** 2 for keep in keeps] for scale in scales]
    return Planner(Prices(cost, 2, 4), LayerErrors(keeps, torch.tensor(errors).double()))


def read(planner: Planner, candidate: Candidate) -> int:
    """Bytes of the MLPs, counted neuron by neuron."""
    cost, total = planner.prices.cost, 0
    rank = candidate.fit.get("rank")
    for layer, (size, neurons, keep) in enumerate(
        zip(cost.per_neuron, cost.num_neurons, candidate.keeps, strict=True)
    ):
        active = candidate.active(layer)
        if active < 1:  # the gate, what it is compared with, and what is behind it
            more = min(active * MORE_ACTIVE, LEAST_SKIPPED)
            size = ceil(size + 4 - (1 - more) * cost.behind_gate[layer])
        total += size * round(keep * neurons)
        if keep < 1 and candidate.stand_in != "none":
            total += 2 + 4 * (rank or 0)
    return total


active_weights = st.lists(st.floats(-3, 3), min_size=7, max_size=7).map(tuple)
profiles = st.builds(
    Profile,
    first=st.integers(0, 2),
    last=st.integers(0, 1),
    spread=st.floats(0, 1.5),
    slope=st.floats(-2, 2),
    bend=st.floats(-2, 2),
    active_weights=st.one_of(st.just(()), active_weights),
)
rows = st.lists(st.tuples(st.integers(20, 90), st.floats(0, 10)), min_size=3, max_size=7)
# Of neurons as small as the least, and of some that skipping spares more than it costs.
models = st.builds(
    lambda rows, width: planner([size for size, _ in rows], [scale for _, scale in rows], width),
    rows,
    st.sampled_from([1, 100]),
)


@given(models, profiles, st.floats(0.05, 1), st.integers(0, 5), st.sampled_from([1.0, 0.7, 0.4]))
def test_no_more_is_read_than_may_be_and_hardly_less(
    made: Planner, profile: Profile, share: float, rank: int, active: float
) -> None:
    stand_in, fit = ("linear", {"rank": rank}) if rank else ("none", {})
    try:
        design = Design("impact", {"active": active}, stand_in, fit, profile)
        candidate = made.candidate(design, share)
    except UserError:
        return
    cost = made.prices.cost
    budget = share * cost.mlp
    assert read(made, candidate) <= budget + 1e-6
    paid = made.prices.stand_in(stand_in, fit)
    assert sum(made.prices.read(candidate)) == read(made, candidate)
    assert all(0 < keep <= 1 for keep in candidate.keeps)
    assert set(range(profile.first)) <= set(candidate.dense_layers)
    # What is left over: a neuron a layer at most, and what a stand-in would have cost where a
    # layer is dense in place of all but dense.
    most = sum(cost.per_neuron) + (paid + max(cost.per_neuron)) * len(cost.per_neuron)
    assert budget - read(made, candidate) <= most


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5), st.floats(0.001, 0.2))
def test_few_bytes_for_layers_of_many_sizes(sizes: list[int], share: float) -> None:
    made = planner(sizes, [1.0] * len(sizes))
    try:
        candidate = made.candidate(Design("impact"), share)
    except UserError:
        assert sum(made.prices.cost.per_neuron) > share * made.prices.cost.mlp
    else:
        assert read(made, candidate) <= share * made.prices.cost.mlp
        assert all(round(k * size) >= 1 for k, size in zip(candidate.keeps, sizes, strict=True))


@given(st.floats(0.2, 0.95), st.integers(0, 4))
def test_a_level_profile_keeps_one_fraction(share: float, rank: int) -> None:
    made = planner([40, 80, 60, 40], [9.0, 1.0, 0.1, 3.0])
    stand_in, fit = ("linear", {"rank": rank}) if rank else ("none", {})
    candidate = made.candidate(Design("impact", {}, stand_in, fit), share)
    sparse = [keep for keep in candidate.keeps if keep < 1]
    if len(sparse) == 4:
        assert max(sparse) - min(sparse) <= 2 / 40


def test_what_is_worth_more_gets_more() -> None:
    made = planner([100] * 4, [8.0, 1.0, 1.0, 4.0])
    keeps = made.candidate(Design("impact", profile=Profile(spread=1.0)), 0.6).keeps
    assert keeps[0] > keeps[3] > keeps[1]
    # The least sum of w (1 - k)^2 has 1 - k in proportion to 1 / w.
    assert (1 - keeps[1]) / (1 - keeps[3]) == pytest.approx(4.0, rel=0.15)
    half = made.candidate(Design("impact", profile=Profile(spread=0.5)), 0.6).keeps
    assert keeps[0] > half[0] > 0.6


def test_weights_move_bytes() -> None:
    made = planner([100] * 4, [1.0] * 4)
    before = made.candidate(Design("impact", profile=Profile(spread=1.0)), 0.6).keeps
    profile = Profile(spread=1.0, weights=(0.0, 0.0, 0.5, 0.0))
    after = made.candidate(Design("impact", profile=profile), 0.6).keeps
    assert after[2] > before[2]
    assert all(after[i] <= before[i] + 0.01 for i in (0, 1, 3))


def test_a_stand_in_is_not_paid_for_where_a_layer_is_all_but_whole() -> None:
    made = planner([20] * 3, [1.0] * 3)
    design = Design("impact", {}, "linear", {"rank": 5}, Profile(spread=1.0))
    candidate = made.candidate(design, 0.999)
    assert 1.0 in candidate.keeps
    assert read(made, candidate) <= 0.999 * made.prices.cost.mlp


@pytest.mark.parametrize(
    ("design", "share"),
    [
        (Design("impact"), 0.001),
        (Design("impact", {}, "linear", {"rank": 99}), 0.5),
        (Design("impact", profile=Profile(first=2, last=1)), 0.6),
        (Design("impact", profile=Profile(first=3, last=1)), 0.9),  # no layer is left
    ],
)
def test_too_few_bytes_are_refused(design: Design, share: float) -> None:
    with pytest.raises(UserError, match="do not pay for"):
        planner([40] * 4, [1.0] * 4).candidate(design, share)
