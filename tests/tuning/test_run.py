"""From a goal to settings, on a formula whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coreinfer.core.layer_errors import LayerErrors
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality
from coreinfer.journal import Journal
from coreinfer.runtime.stores import Stores
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.design import Design, Planner, Profile
from coreinfer.tuning.goal import Goal
from coreinfer.tuning.result import Outcome
from coreinfer.tuning.run import FINALISTS, MOST_REPORTED, Effort, tune
from coreinfer.tuning.tuner import Tuner
from tests.tuning import fakes
from tests.tuning.fakes import COST, LAYERS, PRICES, WORTH, Formula, loss_of, objective

EFFORT = Effort(trials=32, steps=20, seed=0)
PROMPTS = {"search": 6, "report": 5}


def run(goal: Goal, pool: Formula, journal: Journal | None = None, **options: Any) -> Outcome:
    effort = options.pop("effort", EFFORT)
    return tune(objective(pool, journal), PRICES, Stores(), goal, effort, PROMPTS, **options)


def plain(outcome: Outcome) -> dict[str, Any]:
    return {**outcome.to_json(), "seconds": 0}


def test_bytes_are_kept_and_well_used() -> None:
    for share in (0.55, 0.7):
        outcome = run(Goal.of_bytes(share), Formula())
        assert outcome.reached
        chosen = outcome.chosen
        assert share - 0.02 < chosen.share <= share
        assert chosen.bytes_per_token == COST.shared + chosen.share * COST.mlp
        assert chosen.candidate.selector == "impact"
        assert chosen.report is not None
        one_keep, ends_dense = outcome.rivals.values()
        for rival in (one_keep, ends_dense):
            assert rival.share <= share
            assert rival.report is not None
            assert chosen.loss.mean < rival.loss.mean
            assert chosen.report.mean < rival.report.mean
        assert len(set(one_keep.candidate.keeps)) == 1
        assert ends_dense.candidate.dense_layers == (0, 1, 6, 7)
        # What the search found by its options is not counted for its budgets.
        best = min((p for p in outcome.tried if p.stage == "search"), key=lambda p: p.loss.mean)
        level = replace(best.design, profile=Profile())
        assert level in [p.design for p in outcome.tried if p.stage == "one keep"]
        # Layers are worth from 0.1 to 4: what the formula says is best is not far.
        assert loss_of(chosen.candidate) < 0.5 * loss_of(one_keep.candidate)


def test_any_share_of_bytes_is_kept_to_the_last_digit() -> None:
    """0.67187 is just short of 1075 of 1600 neurons."""
    outcome = run(Goal.of_bytes(0.67187), Formula(), effort=Effort(trials=8, steps=0))
    assert outcome.reached
    searched = [point for point in outcome.tried if point.stage in ("one keep", "search")]
    assert len(searched) >= 8
    assert max(point.share for point in searched) <= 0.67187


def test_neurons_are_skipped_where_that_is_asked_for() -> None:
    """Both kinds of the best with one keep are then compared with."""
    goal = Goal.of_bytes(0.7)
    without = run(goal, Formula(), effort=Effort(trials=40, steps=20))
    assert not any(point.candidate.actives for point in without.tried)
    outcome = run(goal, Formula(), effort=Effort(trials=40, steps=20, skipping=True))
    computed, skipped, ends_dense = outcome.rivals.values()
    assert not computed.candidate.actives
    assert max(skipped.candidate.actives) < 1
    assert ends_dense.candidate.dense_layers == (0, 1, 6, 7)
    assert outcome.chosen.loss.mean < skipped.loss.mean < computed.loss.mean
    assert outcome.chosen.loss.mean < without.chosen.loss.mean
    assert all(point.share <= 0.7 + 1e-6 for point in (outcome.chosen, *outcome.rivals.values()))
    assert {"active", "active-budgets"} & outcome.settings.keys()


@pytest.mark.parametrize("unplanned", [500.0, 4_000.0, 20_000.0])
def test_what_reads_more_than_was_planned_is_planned_again(unplanned: float) -> None:
    """Dense ends read the same whatever is planned, so that one correction is not enough."""
    errors = LayerErrors((0.5, 1.0), torch.tensor([[0.25, 0.0]] * LAYERS).double())
    pool = Formula(unplanned=unplanned)
    tuner = Tuner(Goal.of_bytes(0.7), Planner(PRICES, errors), objective(pool))
    design = Design("impact", {"active": 0.5}, profile=Profile(first=2, last=1))
    (point,) = tuner.points([(design, 0.7)], "other bytes")
    assert point is not None
    assert point.share > 0.7
    within = tuner.point_within(design, 0.7, "other bytes")
    assert within is not None
    assert 0.69 < within.share <= 0.7


@pytest.mark.parametrize("text", ["kl<=0.1", "ppl<=+8%", "agreement>=0.93"])
def test_a_budget_is_kept_at_few_bytes(text: str) -> None:
    goal = Goal.of_budget(text)
    outcome = run(goal, Formula())
    assert outcome.reached
    assert goal.limit is not None
    assert outcome.chosen.loss.mean <= goal.limit
    within = [point for point in outcome.tried if point.loss.mean <= goal.limit]
    assert outcome.chosen.share == min(point.share for point in within)
    one_keep = next(iter(outcome.rivals.values()))
    assert one_keep.loss.mean > goal.limit  # at the same bytes


def test_a_budget_that_no_point_keeps_gives_the_closest() -> None:
    outcome = run(Goal.of_budget("kl<=1e-9"), Formula())
    assert not outcome.reached
    assert outcome.chosen.loss.mean == min(point.loss.mean for point in outcome.tried)


def test_too_few_bytes_are_refused_before_anything_is_searched() -> None:
    pool = Formula()
    with pytest.raises(UserError, match=r"--bytes 0.001 cannot be reached.*--bytes 0.0050"):
        run(Goal.of_bytes(0.001), pool)
    assert pool.done == 0


def test_everything_is_said_of_the_front() -> None:
    outcome = run(Goal.of_budget("kl<=0.2"), Formula())
    shares = [point.share for point in outcome.front]
    losses = [point.loss.mean for point in outcome.front]
    assert shares == sorted(shares)
    assert losses == sorted(losses, reverse=True)
    reported = [point for point in outcome.front if point.report is not None]
    assert len(reported) >= min(len(outcome.front), MOST_REPORTED)
    for point in outcome.tried:
        assert set(point.quality) >= {"search"}
        beaten_by_none = all(
            other.loss.mean > point.loss.mean or other.share > point.share or other is point
            for other in outcome.tried
        )
        if beaten_by_none:
            assert point in outcome.front
    record = outcome.to_json()
    assert record["prompts"] == PROMPTS
    assert set(record["chosen"]["quality"]) == {"search", "report"}
    assert record["settings"]["selector"] == "impact"


def test_candidates_are_measured_once() -> None:
    outcome = run(Goal.of_bytes(0.6), Formula())
    keys = [point.candidate.key for point in outcome.tried]
    assert len(keys) == len(set(keys))
    assert len(keys) > 30


def test_the_number_of_workers_changes_nothing() -> None:
    for goal in (Goal.of_bytes(0.6), Goal.of_budget("kl<=0.2")):
        one = plain(run(goal, Formula(workers=1)))
        assert plain(run(goal, Formula(workers=2))) == one
        assert plain(run(goal, Formula(workers=7))) == one


def test_a_seed_decides_the_search() -> None:
    goal = Goal.of_bytes(0.6)
    one = plain(run(goal, Formula()))
    assert plain(run(goal, Formula())) == one
    assert plain(run(goal, Formula(), effort=Effort(32, 20, seed=1))) != one


def test_a_search_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    goal, path = Goal.of_bytes(0.6), tmp_path / "t.jsonl"
    whole = Formula()
    wanted = plain(run(goal, whole))
    done = 0
    for _ in range(3):
        pool = Formula(tasks=whole.done // 4)
        with pytest.raises(KeyboardInterrupt):
            run(goal, pool, Journal(path))
        done += pool.done
    last = Formula()
    assert plain(run(goal, last, Journal(path))) == wanted
    assert done + last.done <= whole.done + 3  # of each task that was cut off, once more
    again = Formula()
    assert plain(run(goal, again, Journal(path))) == wanted
    assert again.done == 0


def test_what_is_known_of_other_prompts_or_another_model_is_not_taken(tmp_path: Path) -> None:
    from coreinfer.tuning.objective import Objective
    from tests.tuning.fakes import window

    journal = Journal(tmp_path / "t.jsonl")
    for about, size in (({"model": "m"}, 2), ({"model": "n"}, 2), ({"model": "m"}, 3)):
        pool = Formula()
        made = Objective(pool, {"search": [window(size)]}, journal, Stores(), about=about)
        made.measure("search", [Candidate("impact", (0.5,) * 8)], "a test")
        assert pool.done == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"trials": 0}, "trials must be at least 1"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"seed": 2**32}, "seed must be 0 to"),
    ],
)
def test_effort_out_of_range(options: dict[str, int], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Effort(**options)


def test_budgets_descend_on_prompts_of_their_own() -> None:
    """From what the search found, to where a byte is worth the same in every layer."""
    goal = Goal.of_bytes(0.6)
    before = run(goal, Formula(), effort=Effort(trials=16, steps=0))
    after = run(goal, Formula(), effort=Effort(trials=16, steps=40))
    assert after.chosen.stage == "descent"
    assert after.chosen.loss.mean < before.chosen.loss.mean
    assert not [point for point in before.tried if point.stage == "descent"]
    keeps = after.chosen.candidate.keeps
    slopes = [w * (1 - k) for w, k in zip(WORTH, keeps, strict=True) if k < 1]
    assert max(slopes) < 2.5 * min(slopes)


def test_what_a_neuron_is_worth_is_a_mean_over_the_prompts_and_kept(tmp_path: Path) -> None:
    pool, path = Formula(), tmp_path / "t.jsonl"
    now = Candidate("impact", (*(0.5,) * 7, 1.0))
    more = now.widened(0.1, COST.num_neurons)
    found = objective(pool, Journal(path)).worth("descent", 0, now, more)
    assert pool.done == 2  # batches
    assert found[7] is None
    others = objective(pool, Journal(path)).worth("descent", 1, now, more)
    assert pool.done == 4  # other prompts
    assert found != others
    again = objective(pool, Journal(path)).worth("descent", 5, now, more)  # 20 prompts, 5 batches
    assert (again, pool.done) == (found, 4)


def test_the_best_designs_are_compared_on_more_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the search took for best, on prompts where it is not, is not where descent begins."""
    goal = Goal.of_bytes(0.6)
    asked: list[str] = []

    def loss(candidate: Candidate) -> float:
        asked.append(candidate.key)
        return loss_of(candidate) * (3.0 if candidate.stand_in == "linear" else 1.0)

    effort = Effort(trials=24, steps=0)
    assert run(goal, Formula(), effort=effort).chosen.candidate.stand_in == "linear"
    pool = Formula()
    measured = objective(pool)
    original = measured.measure

    def measure(part: str, candidates: Sequence[Candidate], what: str) -> list[Quality]:
        with monkeypatch.context() as patch:
            if part == "final":
                patch.setattr(fakes, "loss_of", loss)
            return original(part, candidates, what)

    monkeypatch.setattr(measured, "measure", measure)
    found = tune(measured, PRICES, Stores(), goal, effort, PROMPTS)
    assert found.chosen.candidate.stand_in != "linear"
    assert 1 < len(set(asked)) <= FINALISTS + 2  # and the two that it is measured by
