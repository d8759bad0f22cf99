"""A pool whose results follow from a formula, so that what a search should find is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import exp, sin
from typing import Any

from coreinfer.backends.hf.worth import Worth
from coreinfer.core.measures import ReadCost
from coreinfer.evaluation.continuations import Quality, Window
from coreinfer.journal import Journal
from coreinfer.tuning.candidate import Candidate, Stores
from coreinfer.tuning.objective import Objective
from coreinfer.tuning.prices import Prices
from coreinfer.tuning.work import DENSE, Measure, Weigh

NEURONS = 200
LAYERS = 8
COST = ReadCost(
    shared=10_000,
    per_neuron=(12,) * LAYERS,
    num_neurons=(NEURONS,) * LAYERS,
    behind_gate=(8,) * LAYERS,
)
PRICES = Prices(COST, offset=4, direction=8)
# What dropping costs in each layer: the first and the last are worth most.
WORTH = (4.0, 1.0, 0.2, 0.1, 0.1, 0.2, 0.3, 1.5)
RULES = {"stability": 1.6, "griffin": 1.2, "impact": 1.0}


def loss_of(candidate: Candidate) -> float:
    """KL of a candidate: a sum over layers, less with a linear stand-in of rank 16, and more where
    neurons are skipped, which with neurons as small as these saves nothing."""
    total = sum(w * (1 - keep) ** 2 for w, keep in zip(WORTH, candidate.keeps, strict=True))
    rank = candidate.fit.get("rank", 0)
    skipped = 1 - candidate.rule.get("active", 1.0)
    return RULES[candidate.selector] * total * (0.6 if rank >= 16 else 1.0) * (1 + skipped)


def quality_of(loss: float, read: int, windows: Sequence[Window]) -> Quality:
    size = [1.0 + 0.1 * len(window.prompt) for window in windows]
    return Quality(
        nll=[3.0 + loss * s for s in size],
        kl=[loss * s for s in size],
        agreement=[exp(-loss * s) for s in size],
        density=[0.5] * len(windows),
        bytes_per_token=[read] * len(windows),
    )


def qualities_of(task: Measure) -> dict[str, Quality]:
    results = {DENSE: quality_of(0.0, COST.dense, task.windows)}
    for key in task.keys:
        candidate = Candidate.of_key(key)
        stand_in = PRICES.stand_in(candidate.stand_in, candidate.fit)
        read = COST.shared + PRICES.read(
            candidate.keeps, stand_in, candidate.rule.get("active", 1.0)
        )
        results[key] = quality_of(loss_of(candidate), read, task.windows)
    return results


def worths_of(task: Weigh) -> Worth:
    """The slope of the formula from one candidate to the other, which differs by prompt."""
    now, more = Candidate.of_key(task.now), Candidate.of_key(task.more)
    loss = loss_of(now)
    found: list[float | None] = []
    for layer, (keep, larger) in enumerate(zip(now.keeps, more.keeps, strict=True)):
        keeps = tuple(larger if n == layer else k for n, k in enumerate(now.keeps))
        fallen = loss - loss_of(replace(now, keeps=keeps))
        noise = 1 + 0.3 * sin(layer + len(task.windows[0].prompt))
        added = round(larger * NEURONS) - round(keep * NEURONS)
        found.append(noise * fallen / added if added else None)
    return Worth(loss, found)


class Formula:
    """A pool that computes the formula, and counts; it is cut off after some tasks."""

    def __init__(self, workers: int = 1, tasks: int | None = None) -> None:
        self.workers = workers
        self.done = 0
        self._left = tasks

    def map(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for position, task in reversed(
            list(enumerate(tasks))
        ):  # in no order that is to be relied on
            if self._left is not None and self.done >= self._left:
                raise KeyboardInterrupt
            self.done += 1
            yield position, worths_of(task) if isinstance(task, Weigh) else qualities_of(task)

    def close(self) -> None: ...


def window(size: int) -> Window:
    return Window([1] * size, [1, 2, 3], "a" * size)


def objective(pool: Formula, journal: Journal | None = None) -> Objective:
    search = [window(i % 3 + 1) for i in range(6)]
    many = [window(i + 1) for i in range(20)]
    parts = {"search": search, "report": [window(2)] * 5, "profile": search[:4]}
    parts |= {"descent": many, "final": many[:12]}
    known = Journal() if journal is None else journal
    return Objective(pool, parts, known, Stores(), about={"model": "m"})
