"""From prompts and a goal to settings: search, descent of the budgets, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TypeVar

from coreinfer.calibration.store import CalibrationStore
from coreinfer.errors import UserError, require_whole
from coreinfer.runtime.stores import Stores
from coreinfer.tuning.design import Design, Planner, Profile
from coreinfer.tuning.goal import Goal
from coreinfer.tuning.objective import Objective
from coreinfer.tuning.prices import Prices
from coreinfer.tuning.profile import measured_errors
from coreinfer.tuning.result import Outcome, Point
from coreinfer.tuning.space import Space
from coreinfer.tuning.study import front, search
from coreinfer.tuning.tuner import DESCENT, FINAL, REPORT, SEARCH, Tuner

PROFILE = "profile"  # the part of the prompts that single layers are measured on
ONE_KEEP = "best one keep"  # for all layers, of which none is skipped
ONE_ACTIVE = "best one keep, skipping"  # where that does better
ENDS_DENSE = "ends dense"  # the best of those settings with the first 3 and last 2 layers dense
SHARES = (0.4, 0.55, 0.8, 0.9)  # at which the front is completed
MOST_REPORTED = 6  # points of the front
FINALISTS = 6  # designs that are compared on more prompts
RIVALS_TRIED = 4  # designs that are tried with one keep, and settings with one keep with dense ends


T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        trials: designs that the search measures.
        steps: of the budgets' descent.
        seed: of the search.
        skipping: whether core neurons may be skipped (`--active`): fewer bytes, but less time only
            where rows are long.
    """

    trials: int = 64
    steps: int = 40
    seed: int = 0
    skipping: bool = False

    def __post_init__(self) -> None:
        require_whole("trials", self.trials, 1)
        require_whole("steps", self.steps, 0)
        require_whole("seed", self.seed, 0, 2**32 - 1)


def tune(
    objective: Objective,
    prices: Prices,
    stores: Stores,
    goal: Goal,
    effort: Effort,
    prompts: dict[str, int],
    on_progress: Callable[[str], None] = lambda _line: None,
) -> Outcome:
    """Search for the settings that reach a goal.

    Args:
        objective: measures candidates on the parts "search", "report", "descent" (many, on which
            budgets descend), "final" (some of those, on which the best designs are compared) and
            "profile" (a few, to measure single layers on where no calibration store has done so).
        prices: of neurons and stand-ins.
        stores: that rules and stand-ins may use.
        goal: a limit of the loss, or of the bytes.
        effort: how much is tried.
        prompts: how many, by part; for the record.
        on_progress: told of what is found.

    Raises:
        UserError: if the bytes asked for are too few for any setting, or the workers failed.
    """
    began = perf_counter()
    require_bytes(prices, goal)
    layers = len(prices.cost.num_neurons)
    calibration: CalibrationStore | None = stores.opened.get("calibration")
    if calibration is not None:
        errors = calibration.layer_errors
    else:
        errors = measured_errors(objective, PROFILE, layers)
    tuner = Tuner(goal, Planner(prices, errors), objective)
    space = Space.of(prices, stores, goal.share, skips=effort.skipping)

    def evaluate(
        designs: Sequence[tuple[Design, float]],
    ) -> list[tuple[float, float] | None]:
        found = tuner.points(designs, SEARCH)
        on_progress(f"{len(tuner.tried)} settings tried; {_best(tuner)}")
        return [None if one is None else (one.loss.mean, one.share) for one in found]

    search(space, evaluate, effort.trials, effort.seed)
    everything = list(tuner.tried.values())
    kept = tuner.within(everything)
    reached = bool(kept)
    if not reached:
        chosen = _closest(everything, goal)
    elif goal.limit is None:
        chosen = kept[0]
    else:
        chosen = tuner.cheapest(_distinct(kept, lambda point: point.design)[:3])
    share = chosen.asked
    # What is best on few prompts is so by chance, too: more of them decide where to begin, and
    # whether what was found from there is better.
    begins = _distinct([point.design for point in [chosen, *kept]], lambda design: design)
    start = tuner.best_of([*begins[:FINALISTS], *_single_designs(tuner, share).values()], share)
    design = tuner.best_of([start, tuner.descended(start, share, effort.steps)], share)
    found = tuner.point_within(design, share, FINAL if design == start else DESCENT)
    if found is not None and (goal.limit is not None or tuner.within([found])):
        chosen = found
    if goal.limit is not None and tuner.within([chosen]):
        chosen = tuner.cheapest([chosen])
    tuner.points([(chosen.design, share) for share in SHARES], "other bytes")
    if goal.limit is not None:
        everything = list(tuner.tried.values())
        kept = tuner.within(everything)
        reached = bool(kept)
        chosen = kept[0] if reached else _closest(everything, goal)
    return _outcome(tuner, stores, reached, chosen, prompts, began)


def require_bytes(prices: Prices, goal: Goal) -> None:
    """Raises UserError where no setting reads as few bytes as the goal allows."""
    least = sum(prices.cost.per_neuron) / prices.cost.mlp
    if goal.share is not None and goal.share < least:
        raise UserError(
            f"--bytes {goal.share:g} cannot be reached: one neuron a layer is the least, "
            f"--bytes {least:.4f}"
        )


def _outcome(
    tuner: Tuner,
    stores: Stores,
    reached: bool,
    chosen: Point,
    prompts: dict[str, int],
    began: float,
) -> Outcome:
    everything = list(tuner.tried.values())
    best = front([(point.loss.mean, point.share) for point in everything])
    on_front = [everything[i] for i in best]
    rivals = _rivals(tuner, chosen)
    shown = _spread([one for one in on_front if one is not chosen], MOST_REPORTED)
    reported = tuner.reported([chosen, *rivals.values(), *shown])
    by_key = {point.candidate.key: point for point in reported}
    cost = tuner.planner.prices.cost
    return Outcome(
        goal=tuner.goal,
        reached=reached,
        chosen=reported[0],
        front=tuple(by_key.get(point.candidate.key, point) for point in on_front),
        rivals=dict(zip(rivals, reported[1:], strict=False)),
        tried=tuple(by_key.get(point.candidate.key, point) for point in tuner.tried.values()),
        dense={part: tuner.objective.dense(part).summary() for part in (SEARCH, REPORT)},
        settings=chosen.candidate.options(stores),
        dense_bytes_per_token=cost.dense,
        prompts=prompts,
        seconds=perf_counter() - began,
    )


def _rivals(tuner: Tuner, chosen: Point) -> dict[str, Point]:
    """What the chosen point is to be compared with, at its bytes."""
    made = _single_designs(tuner, chosen.asked)
    found = {
        name: tuner.point_within(design, chosen.asked, "other bytes")
        for name, design in made.items()
    }
    return {name: point for name, point in found.items() if point is not None}


def _single_designs(tuner: Tuner, share: float) -> dict[str, Design]:
    """The best setting with one keep for all layers, the best of which neurons are skipped where
    that is better, and the best with the ends dense, at this share of bytes."""
    single = _single(tuner)
    if not single:
        return {}
    best = single[0].design
    layers = tuner.planner.num_layers
    ends = Profile(first=min(3, layers // 4), last=min(2, layers // 4))
    computed = (point.design for point in single if not point.candidate.actives)
    made = {ONE_KEEP: next(computed, best), ONE_ACTIVE: best}
    if made[ONE_KEEP] == best:
        del made[ONE_ACTIVE]
    tried = [replace(point.design, profile=ends) for point in single[:RIVALS_TRIED]]
    found = [one for one in tuner.points([(design, share) for design in tried], ENDS_DENSE) if one]
    if found:
        made[ENDS_DENSE] = min(found, key=lambda point: point.loss.mean).design
    return made


def _single(tuner: Tuner) -> list[Point]:
    """All settings with one keep for all layers, the best first: those that the search began with,
    and the best of what it found since, without the profile of their budgets."""
    points = list(tuner.tried.values())
    single = [point for point in points if point.stage == "one keep"]
    if not single:
        return []
    asked = single[0].asked
    found = sorted((p for p in points if p.stage == SEARCH), key=lambda point: point.loss.mean)
    level = _distinct(
        [replace(point.design, profile=Profile()) for point in found], lambda one: one
    )
    tuner.points([(design, asked) for design in level[:RIVALS_TRIED]], SEARCH)
    again = [p for p in tuner.tried.values() if p.stage == "one keep" and p.asked == asked]
    return sorted(again, key=lambda point: point.loss.mean)


def _closest(points: Sequence[Point], goal: Goal) -> Point:
    """To a limit, of the loss or of the bytes, that none of them keeps."""
    if goal.limit is None:
        return min(points, key=lambda point: (point.share, point.loss.mean))
    return min(points, key=lambda point: (point.loss.mean, point.share))


def _distinct(items: Sequence[T], design_of: Callable[[T], Design]) -> list[T]:
    """The first of each design, in their order."""
    kept: list[T] = []
    for item in items:
        if all(design_of(item) != design_of(other) for other in kept):
            kept.append(item)
    return kept


def _spread(points: Sequence[Point], count: int) -> list[Point]:
    """At most `count` of them, evenly spaced, the ends among them."""
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _best(tuner: Tuner) -> str:
    kept = tuner.within(list(tuner.tried.values()))
    if not kept:
        return f"none within {tuner.goal} yet"
    return f"best so far {tuner.goal.describe_loss(kept[0].loss)} at {kept[0].share:.3f} of the MLP"
