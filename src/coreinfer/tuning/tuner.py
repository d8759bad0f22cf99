"""Designs measured on the prompts to search with, and what the goal says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import floor
from statistics import fmean

from tqdm import tqdm

from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.descent import descend
from coreinfer.tuning.design import Design, Planner
from coreinfer.tuning.goal import Goal
from coreinfer.tuning.objective import Objective
from coreinfer.tuning.prices import MOST_ACTIVE
from coreinfer.tuning.result import Point
from coreinfer.tuning.space import LEAST_SHARE

SEARCH, DESCENT, FINAL, REPORT = "search", "descent", "final", "report"  # parts of the prompts
WIDER = 0.04  # of a layer's neurons: the next to be kept, or active, whose worth is weighed
LEAST_ACTIVE = 0.2  # from which more are, until the bytes are spent
ROUNDING = 1e-6  # of a share of bytes
TRIES = 4  # to stay within the bytes where what is read is known afterwards
STEPS = 8  # shares that are measured at a time, to find the least within a limit


@dataclass
class Tuner:
    """Measures designs, and remembers the points.

    Attributes:
        goal: what is asked for.
        planner: makes candidates.
        objective: measures them.
        tried: all points so far, each candidate once.
    """

    goal: Goal
    planner: Planner
    objective: Objective
    tried: dict[str, Point] = field(default_factory=dict)

    def points(self, designs: Sequence[tuple[Design, float]], stage: str) -> list[Point | None]:
        """Of designs with their shares of bytes; None where these do not pay for the design."""
        made = [self._effective(*one) for one in designs]
        known = [candidate for candidate in made if candidate is not None]
        measured = self.objective.measure(SEARCH, known, stage) if known else []
        qualities = iter(measured)
        found: list[Point | None] = []
        for (design, asked), candidate in zip(designs, made, strict=True):
            if candidate is None:
                found.append(None)
                continue
            point = self._point(stage, design, asked, candidate, next(qualities))
            found.append(self.tried.setdefault(candidate.key, point))
        return found

    def _candidate(self, design: Design, share: float) -> Candidate | None:
        try:
            return self.planner.candidate(design, share)
        except UserError:
            return None

    def _effective(self, design: Design, share: float) -> Candidate | None:
        """What of a design is measured, once where several come to the same."""
        candidate = self._candidate(design, share)
        return None if candidate is None else candidate.effective

    def _point(
        self, stage: str, design: Design, asked: float, candidate: Candidate, quality: Quality
    ) -> Point:
        cost, read = self.planner.prices.cost, fmean(quality.bytes_per_token)
        return Point(
            "one keep" if stage == SEARCH and _is_single(design) else stage,
            design,
            asked,
            candidate,
            (read - cost.shared) / cost.mlp,
            read,
            self.goal.loss(quality, self.objective.dense(SEARCH)),
            quality={SEARCH: quality.summary()},
        )

    def descended(self, design: Design, share: float, steps: int) -> Design:
        """With the budgets that a byte is worth the same in, at this share of bytes.

        Bytes move between layers by what they keep or, where all is kept and some skipped, by what
        is active there. Not by both at once: that ended at more loss than either.
        """
        prices, moved = self.planner.prices, "weights"
        begin = self._candidate(design, share)
        if begin is not None and begin.keeps_all:  # and goes on to, whatever its weights become
            moved = "active_weights"
            design = replace(design, rule={**design.rule, "active": LEAST_ACTIVE})

        def worths(number: int, design: Design) -> list[float | None] | None:
            now = self._candidate(design, share)
            if now is None:
                return None
            if now.keeps_all:
                more = now.more_active(WIDER, MOST_ACTIVE)
            else:
                more = now.widened(WIDER, prices.cost.num_neurons)
            if more == now:  # no layer has anything left to read
                return None
            gains = self.objective.worth(DESCENT, number, now, more)
            bar.update()
            return _by_byte(gains, prices.read(now), prices.read(more))

        with tqdm(total=steps, desc=DESCENT, leave=False, unit="step", disable=None) as bar:
            return descend(design, self.planner.num_layers, worths, steps, moved)

    def best_of(self, designs: Sequence[Design], share: float) -> Design:
        """The design of least loss on more prompts than it was found with, at this share of bytes;
        the first where the bytes pay for none."""
        made = [(design, self._effective(design, share)) for design in designs]
        known: dict[str, tuple[Candidate, Design]] = {}
        for design, one in made:
            if one is not None:
                known.setdefault(one.key, (one, design))
        if len(known) < 2:
            return designs[0]
        candidates = [candidate for candidate, _ in known.values()]
        found = self.objective.measure(FINAL, candidates, FINAL)
        dense = self.objective.dense(FINAL)
        losses = [self.goal.loss(quality, dense).mean for quality in found]
        _, best = list(known.values())[losses.index(min(losses))]
        return best

    def point_within(self, design: Design, share: float, stage: str) -> Point | None:
        """The design at what reads no more than this share of bytes, which is known afterwards
        where core neurons are skipped; None where they do not pay for it."""
        asked, found = share, None
        for _ in range(TRIES):
            (found,) = self.points([(design, asked)], stage)
            if found is None or found.share <= share + ROUNDING:
                break
            asked = floor(1e4 * asked * share / found.share) / 1e4
        return found

    def reported(self, points: Sequence[Point]) -> list[Point]:
        """The same points with what they are on the prompts to report on."""
        measured = self.objective.measure(REPORT, [point.candidate for point in points], REPORT)
        dense = self.objective.dense(REPORT)
        return [
            replace(
                point,
                report=self.goal.loss(quality, dense),
                quality={**point.quality, REPORT: quality.summary()},
            )
            for point, quality in zip(points, measured, strict=True)
        ]

    def within(self, points: Sequence[Point | None]) -> list[Point]:
        """Those that keep the goal's limit, the fewest bytes first; or its bytes, least loss first.

        What is read is measured where core neurons are skipped, and may be more than was planned.
        """
        there = [point for point in points if point is not None]
        limit, share = self.goal.limit, self.goal.share
        if limit is None:
            kept = [point for point in there if share is None or point.share <= share + ROUNDING]
            return sorted(kept, key=lambda point: point.loss.mean)
        kept = [point for point in there if point.loss.mean <= limit]
        return sorted(kept, key=lambda point: (point.share, point.loss.mean))

    def cheapest(self, designs: Sequence[Point]) -> Point:
        """The fewest bytes at which one of these designs is within the limit.

        Shares are measured some at a time, first from the least to what is known to be enough,
        then between the two ends that are left.
        """
        best = designs[0]
        low = LEAST_SHARE
        for _ in range(2):
            step = (best.asked - low) / STEPS
            shares = [round(low + i * step, 4) for i in range(STEPS)]
            asked = [(one.design, share) for one in designs for share in shares]
            best = min(
                [best, *self.within(self.points(asked, "other bytes"))], key=lambda p: p.share
            )
            low = max((share for share in shares if share < best.asked), default=low)
            designs = [best]
        return best


def _by_byte(
    gains: Sequence[float | None], now: Sequence[int], then: Sequence[int]
) -> list[float | None]:
    """What each layer gains by a byte more, from what it gains by reading `then` for `now`."""
    layers = zip(gains, now, then, strict=True)
    return [None if gain is None or b <= a else gain / (b - a) for gain, a, b in layers]


def _is_single(design: Design) -> bool:
    profile = design.profile
    return profile.is_level and not profile.first and not profile.last
