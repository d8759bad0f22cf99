"""Budgets as they are typed, and the losses that they bound."""

from __future__ import annotations

import math
from contextlib import suppress
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality
from coreinfer.tuning.goal import Goal


@given(st.floats(1e-6, 100), st.sampled_from(["kl<={}", " KL <= {} ", "kl<= {}"]))
def test_a_kl_budget(limit: float, form: str) -> None:
    assert Goal.of_budget(form.format(repr(limit))) == Goal("kl", limit=limit)


@given(st.floats(1e-3, 1000), st.sampled_from(["ppl<=+{}%", "ppl<={}%", "ppl <= + {} %"]))
def test_a_perplexity_budget_is_in_percent(limit: float, form: str) -> None:
    assert Goal.of_budget(form.format(repr(limit))) == Goal("ppl", limit=limit / 100)


@given(st.floats(1e-6, 1))
def test_an_agreement_budget_bounds_the_rest(share: float) -> None:
    assert Goal.of_budget(f"agreement>={share!r}") == Goal("agreement", limit=1 - share)


@given(st.text(max_size=20) | st.from_regex(r"(kl|ppl|agreement)[<>]=[+-]?[0-9.e%]{0,6}"))
def test_any_text_is_a_goal_with_a_limit_or_refused(text: str) -> None:
    with suppress(UserError):
        goal = Goal.of_budget(text)
        assert goal.limit is not None
        assert 0 <= goal.limit < math.inf


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no budget"),
        ("kl", "is no budget"),
        ("kl<0.1", "is no budget"),
        ("loss<=0.1", "is no budget"),
        ("kl<=-0.1", "is no budget"),
        ("kl<=nan", "is no budget"),
        ("kl>=0.1", "from the wrong side"),
        ("agreement<=0.9", "from the wrong side"),
        ("ppl<=2", "in percent"),
        ("kl<=5%", "in percent"),
        ("kl<=+0.1", "belongs to ppl alone"),
        ("agreement>=1.5", "agreement must be above 0 and at most 1"),
        ("kl<=0", "kl must be above 0"),
        ("ppl<=+0%", "ppl must be above 0"),
        ("kl<=1e999", "kl must be above 0"),
    ],
)
def test_what_is_no_budget_says_why(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Goal.of_budget(text)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.0, 2.0, math.nan])
def test_shares_outside_their_range(share: float) -> None:
    with pytest.raises(UserError, match="bytes must be"):
        Goal.of_bytes(share)


@given(st.lists(st.tuples(*[st.floats(0.01, 5)] * 3, st.floats(0, 1)), min_size=1, max_size=6))
def test_losses_are_what_their_names_say(rows: list[tuple[float, float, float, float]]) -> None:
    dense = Quality(nll=[a for a, *_ in rows])
    sparse = Quality(
        nll=[b for _, b, *_ in rows], kl=[c for _, _, c, _ in rows], agreement=[d for *_, d in rows]
    )
    assert Goal("kl", limit=1).loss(sparse, dense).mean == pytest.approx(fmean(sparse.kl))
    rise = sparse.perplexity / dense.perplexity - 1
    assert Goal("ppl", limit=1).loss(sparse, dense).mean == pytest.approx(rise, rel=1e-9, abs=1e-12)
    missed = Goal("agreement", limit=1).loss(sparse, dense).mean
    assert missed == pytest.approx(1 - fmean(sparse.agreement))


def test_the_error_of_a_rise_is_that_of_resampled_ratios() -> None:
    """The delta method, against the spread of the ratio over many draws of as many windows."""
    import random

    draw = random.Random(0)
    rises = [draw.gauss(0.1, 0.05) for _ in range(400)]
    dense, sparse = Quality(nll=[1.0] * 400), Quality(nll=[1.0 + r for r in rises])
    error = Goal("ppl", limit=1).loss(sparse, dense).error
    ratios = [math.exp(fmean(draw.choices(rises, k=400))) for _ in range(2000)]
    centre = fmean(ratios)
    assert error == pytest.approx(math.sqrt(fmean((r - centre) ** 2 for r in ratios)), rel=0.1)


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        (Goal.of_budget("kl<=0.05"), "kl <= 0.05"),
        (Goal.of_budget("ppl<=+2%"), "ppl <= +2 %"),
        (Goal.of_budget("agreement>=0.9"), "agreement >= 0.9"),
        (Goal.of_bytes(0.7), "bytes <= 0.7 of the dense MLPs'"),
    ],
)
def test_a_goal_reads_as_it_was_typed(goal: Goal, text: str) -> None:
    assert str(goal) == text
