"""What a tuning run found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.design import Design
from coreinfer.tuning.goal import Goal, Measured


@dataclass(frozen=True)
class Point:
    """A candidate that was measured.

    Attributes:
        stage: at which it was tried: "one keep", "search", "final", "descent" or
            "other bytes".
        design: what it was made from.
        asked: the share of the dense MLPs' bytes that it was made for.
        candidate: it.
        share: of the dense MLPs' bytes that it reads.
        bytes_per_token: that it reads in all, mean over the prompts.
        loss: on the prompts to search with, as the goal counts it.
        report: on those to report on, where it was measured on them.
        quality: the same of all measures, by part, plain JSON.
    """

    stage: str
    design: Design
    asked: float
    candidate: Candidate
    share: float
    bytes_per_token: float
    loss: Measured
    report: Measured | None = None
    quality: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "settings": self.candidate.name,
            "selector": self.candidate.selector,
            **self.candidate.rule,
            "stand_in": self.candidate.stand_in,
            **self.candidate.fit,
            "dense_layers": list(self.candidate.dense_layers),
            "keeps": list(self.candidate.keeps),
            "actives": list(self.candidate.actives),
            "mlp_share": self.share,
            "bytes_per_token": self.bytes_per_token,
            "search": asdict(self.loss),
            "report": None if self.report is None else asdict(self.report),
            "quality": {part: dict(one) for part, one in self.quality.items()},
        }


@dataclass(frozen=True)
class Outcome:
    """The answer to a goal.

    Attributes:
        goal: what was asked for.
        reached: whether the chosen point is within it, on the prompts to search with.
        chosen: the point to use; the closest one where the goal was not reached.
        front: the points that no other is as good as in loss and bytes, the cheapest first.
        rivals: by name, what the chosen one is to be compared with, at the same bytes.
        tried: all points, in the order in which they were tried.
        dense: summary of dense decoding by part, plain JSON.
        settings: the chosen one as options of the command line.
        dense_bytes_per_token: of dense decoding, attention and all.
        prompts: how many, by part.
        seconds: that it took, but for what was known from an earlier run.
    """

    goal: Goal
    reached: bool
    chosen: Point
    front: tuple[Point, ...]
    rivals: Mapping[str, Point]
    tried: tuple[Point, ...]
    dense: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    dense_bytes_per_token: int
    prompts: Mapping[str, int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "goal": str(self.goal),
            "metric": self.goal.metric,
            "reached": self.reached,
            "settings": dict(self.settings),
            "chosen": self.chosen.to_json(),
            "rivals": {name: point.to_json() for name, point in self.rivals.items()},
            "front": [point.to_json() for point in self.front],
            "tried": [point.to_json() for point in self.tried],
            "dense": {part: dict(one) for part, one in self.dense.items()},
            "dense_bytes_per_token": self.dense_bytes_per_token,
            "prompts": dict(self.prompts),
            "seconds": self.seconds,
        }
