"""The Pareto front, and the search."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from coreinfer.runtime.stores import Stores
from coreinfer.tuning.design import Design
from coreinfer.tuning.space import LEAST_SHARE, MOST_SHARE, Space
from coreinfer.tuning.study import BATCH, front, search
from tests.tuning.fakes import PRICES

numbers = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 3.0])


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    kept = front(points)
    beaten = {
        i
        for i, (loss, cost) in enumerate(points)
        for j, (other, its_cost) in enumerate(points)
        if other <= loss and its_cost <= cost and ((other, its_cost) != (loss, cost) or j < i)
    }
    assert set(kept) == set(range(len(points))) - beaten
    costs = [points[i][1] for i in kept]
    assert costs == sorted(costs)


def record(share: float | None, trials: int, seed: int) -> list[list[tuple[Design, float]]]:
    """The batches of a search whose loss is least for impact with a rank of 16 and more."""
    batches = []

    def evaluate(designs: Sequence[tuple[Design, float]]) -> list[tuple[float, float] | None]:
        batches.append(list(designs))
        return [
            None if share is None and asked > 0.9
            else (
                (design.selector != "impact") + (design.fit.get("rank", 0) < 16)
                + abs(design.profile.spread - 0.6) + 1 - asked,
                asked,
            )
            for design, asked in designs
        ]  # fmt: skip

    search(Space.of(PRICES, Stores(), share), evaluate, trials, seed)
    return batches


def test_every_rule_is_tried_with_every_stand_in_first() -> None:
    designs = [design for batch in record(0.6, 20, 0) for design, _ in batch]
    level = [(d.selector, d.stand_in) for d in designs[:9]]
    assert sorted(level) == [
        (rule, stand_in)
        for rule in ("griffin", "impact", "stability")
        for stand_in in ("linear", "mean", "none")
    ]
    assert all(d.profile.is_level and not d.profile.first for d in designs[:9])
    assert any(d.profile.first for d in designs[9:20])


def test_batches_have_one_size_and_trials_are_counted() -> None:
    for share in (0.6, None):
        sizes = [len(batch) for batch in record(share, 21, 0)]
        assert sizes == [BATCH, BATCH, 5]


def test_the_same_seed_gives_the_same_designs() -> None:
    for share in (0.6, None):
        first = record(share, 32, 3)
        assert record(share, 32, 3) == first
        assert record(share, 32, 4) != first


def test_the_search_finds_what_is_good() -> None:
    batches = record(0.6, 64, 0)
    last = [design for batch in batches[-2:] for design, _ in batch]
    assert sum(d.selector == "impact" for d in last) > len(last) / 2
    assert sum(d.fit.get("rank", 0) >= 16 for d in last) > len(last) / 2


def test_shares_are_given_or_searched() -> None:
    assert {share for batch in record(0.6, 24, 0) for _, share in batch} == {0.6}
    searched = [share for batch in record(None, 48, 0) for _, share in batch]
    assert all(LEAST_SHARE <= share <= MOST_SHARE for share in searched)
    assert len(set(searched)) > 20


def test_values_are_as_short_as_they_are_written() -> None:
    for batch in record(None, 40, 1):
        for design, share in batch:
            for value in [*design.rule.values(), *design.fit.values()]:
                assert value == float(f"{value:.3g}") or isinstance(value, int)
            assert share == round(share, 4)
