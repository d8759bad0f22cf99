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
from coreinfer.runtime.stores import Stores
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.objective import Objective
from coreinfer.tuning.prices import Prices
from coreinfer.tuning.work import DENSE, Measure, Weigh

NEURONS = 200
LAYERS = 8
COST = ReadCost(
    shared=1_000_000,
    per_neuron=(1200,) * LAYERS,
    num_neurons=(NEURONS,) * LAYERS,
    behind_gate=(800,) * LAYERS,
)
PRICES = Prices(COST, offset=400, direction=800)
# What dropping costs in each layer: the first and the last are worth most.
WORTH = (4.0, 1.0, 0.2, 0.1, 0.1, 0.2, 0.3, 1.5)
# What skipping costs in each.
OPEN = (0.06, 0.02, 0.1, 0.1, 0.04, 0.04, 0.2, 0.2)
RULES = {"stability": 1.6, "griffin": 1.2, "impact": 1.0}


def loss_of(candidate: Candidate) -> float:
    """KL of a candidate: a sum over layers, of what is dropped and of what is skipped, less with a
    linear stand-in of rank 16."""
    total = sum(w * (1 - keep) ** 2 for w, keep in zip(WORTH, candidate.keeps, strict=True))
    rank = candidate.effective.fit.get("rank", 0)
    skipped = sum(w * (1 - active) ** 2 for w, active in zip(OPEN, candidate.actives, strict=False))
    return RULES[candidate.selector] * (total + skipped) * (0.6 if rank >= 16 else 1.0)


def quality_of(loss: float, read: int, windows: Sequence[Window]) -> Quality:
    size = [1.0 + 0.1 * len(window.prompt) for window in windows]
    return Quality(
        nll=[3.0 + loss * s for s in size],
        kl=[loss * s for s in size],
        agreement=[exp(-loss * s) for s in size],
        density=[0.5] * len(windows),
        bytes_per_token=[read] * len(windows),
    )


def qualities_of(task: Measure, unplanned: float) -> dict[str, Quality]:
    results = {DENSE: quality_of(0.0, COST.dense, task.windows)}
    for key in task.keys:
        candidate = Candidate.of_key(key)
        read = COST.shared + sum(PRICES.read(candidate))
        read += round(unplanned * sum(active < 1 for active in candidate.actives))
        results[key] = quality_of(loss_of(candidate), read, task.windows)
    return results


def worths_of(task: Weigh) -> Worth:
    """What the formula falls by from one candidate to the other, which differs by prompt."""
    now, more = Candidate.of_key(task.now), Candidate.of_key(task.more)
    loss = loss_of(now)
    gains: list[float | None] = []
    for layer in range(LAYERS):
        then = replace(
            now,
            keeps=_with_one(now.keeps, more.keeps, layer),
            actives=_with_one(now.actives, more.actives, layer),
        )
        noise = 1 + 0.3 * sin(layer + len(task.windows[0].prompt))
        gains.append(None if then == now else noise * (loss - loss_of(then)))
    return Worth(loss, gains)


def _with_one(values: tuple[float, ...], others: tuple[float, ...], at: int) -> tuple[float, ...]:
    return tuple(b if n == at else a for n, (a, b) in enumerate(zip(values, others, strict=True)))


class Formula:
    """A pool that computes the formula, and counts; it is cut off after some tasks. Layers that
    skip read so many `unplanned` bytes more than was planned."""

    def __init__(self, workers: int = 1, tasks: int | None = None, unplanned: float = 0.0) -> None:
        self.workers = workers
        self.done = 0
        self._left = tasks
        self._unplanned = unplanned

    def map(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for position, task in reversed(
            list(enumerate(tasks))
        ):  # in no order that is to be relied on
            if self._left is not None and self.done >= self._left:
                raise KeyboardInterrupt
            self.done += 1
            if isinstance(task, Weigh):
                yield position, worths_of(task)
            else:
                yield position, qualities_of(task, self._unplanned)

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
