"""One task's result: every metric under every rule, with intervals, paired against dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from coreinfer.evaluation.answers import Answer
from coreinfer.evaluation.bootstrap import RESAMPLES, Aggregate, interval, resampled

Section = dict[str, Any]  # plain JSON


@dataclass(frozen=True)
class Metric:
    """A metric of a task.

    Attributes:
        name: as lm-eval calls it, with its filter where it has one.
        items: what each rule scored on each item; the same items in the same order.
        aggregate: items -> the metric.
        higher_is_better: None where nobody says.
        resamples: of the bootstrap.
    """

    name: str
    items: Mapping[str, Sequence[Any]]
    aggregate: Aggregate = fmean
    higher_is_better: bool | None = True
    resamples: int = RESAMPLES


@dataclass
class Cost:
    """What the tokens of each rule were computed with: means over what it answered."""

    density: dict[str, float] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)

    def add(self, rule: str, answers: Sequence[Answer]) -> None:
        self.density[rule] = fmean(a["density"] for a in answers)
        self.bytes_per_token[rule] = fmean(a["bytes_per_token"] for a in answers)


def section(
    task: str, metrics: Sequence[Metric], cost: Cost, *, baseline: str, seed: int, **about: Any
) -> Section:
    """The result as plain JSON; `about` is what else is to be known of the task."""
    rules = list(metrics[0].items)
    return {
        "task": task,
        **about,
        "items": len(metrics[0].items[rules[0]]),
        "rules": {
            rule: {
                "density": cost.density[rule],
                "bytes_per_token": cost.bytes_per_token[rule],
                "bytes_of_dense": cost.bytes_per_token[rule] / cost.bytes_per_token[baseline],
            }
            for rule in rules
        },
        "metrics": [_measured(metric, baseline, seed) for metric in metrics],
    }


def _measured(metric: Metric, baseline: str, seed: int) -> dict[str, Any]:
    drawn = {
        rule: resampled(items, metric.aggregate, count=metric.resamples, seed=seed)
        for rule, items in metric.items.items()
    }
    values = {rule: float(metric.aggregate(list(x))) for rule, x in metric.items.items()}
    measured: dict[str, Any] = {}
    for rule, value in values.items():
        measured[rule] = {"value": value, "interval": interval(drawn[rule])}
        if rule != baseline:
            measured[rule]["difference"] = value - values[baseline]
            measured[rule]["difference_interval"] = interval(drawn[rule] - drawn[baseline])
    return {
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "resamples": metric.resamples,
        "rules": measured,
        "per_item": {
            rule: list(items)
            for rule, items in metric.items.items()
            if all(isinstance(item, (int, float)) for item in items)
        },
    }


HEAD = ("task", "metric", "rule", "value [95 %]", "against dense [95 %]", "density", "bytes/dense")


def table_rows(
    sections: Sequence[Section], headlines: Mapping[str, Sequence[str]]
) -> list[list[str]]:
    """Cells of a table, its head first; of tasks with headline metrics those alone."""
    rows = [list(HEAD)]
    for one in sections:
        wanted = headlines.get(one["task"], ())
        for metric in one["metrics"]:
            if wanted and metric["metric"] not in wanted:
                continue
            for rule, measured in metric["rules"].items():
                cost = one["rules"][rule]
                change = ""
                if "difference" in measured:
                    change = _with_interval(
                        measured["difference"], measured["difference_interval"], "+"
                    )
                rows.append(
                    [
                        f"{one['task']} ({one['items']})",
                        metric["metric"] + (" ↓" if metric["higher_is_better"] is False else ""),
                        rule,
                        _with_interval(measured["value"], measured["interval"]),
                        change,
                        f"{cost['density']:.3f}",
                        f"{cost['bytes_of_dense']:.3f}",
                    ]
                )
    return rows


def _with_interval(value: float, ends: Sequence[float], sign: str = "") -> str:
    digits = 3 if abs(value) < 10 else 1
    low, high = (f"{end:{sign}.{digits}f}" for end in ends)
    return f"{value:{sign}.{digits}f} [{low}, {high}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
