"""One task's result: every metric under every rule, with intervals, paired against dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from coreinfer.evaluation.bootstrap import RESAMPLES, Aggregate, interval, resampled
from coreinfer.journal import Entry

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


def cost_of(answers: Sequence[Entry]) -> dict[str, float]:
    """What the answers of a rule were computed with.

    Returns:
        Means over the answers. tokens_per_answer: of generation the limit where none stops.
        sparse_tokens: the share of an answer's tokens that sparse layers predict: all but the first
        one, none where all is dense. It is taken answer by answer, so that a few which never stop
        do not hide that the dense prefill settled the others.
    """
    return {
        "density": fmean(answer["density"] for answer in answers),
        "bytes_per_token": fmean(answer["bytes_per_token"] for answer in answers),
        "tokens_per_answer": fmean(answer["tokens"] for answer in answers),
        "sparse_tokens": fmean(_sparse_share(answer) for answer in answers),
    }


def _sparse_share(answer: Entry) -> float:
    tokens = answer["tokens"]
    return (tokens - 1) / tokens if tokens and answer["density"] < 1 else 0.0


def section(
    task: str,
    metrics: Sequence[Metric],
    costs: Mapping[str, dict[str, float]],
    *,
    baseline: str,
    seed: int,
    **about: Any,
) -> Section:
    """The result as plain JSON; `about` is what else is to be known of the task."""
    dense = costs[baseline]["bytes_per_token"]
    return {
        "task": task,
        **about,
        "items": len(metrics[0].items[baseline]),
        "rules": {
            rule: {**cost, "bytes_of_dense": cost["bytes_per_token"] / dense}
            for rule, cost in costs.items()
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
    }


HEAD = (
    "task (items)", "metric", "rule", "value [95 %]", "against dense [95 %]", "density",
    "bytes per token", "of dense", "tokens per answer", "sparse tokens",
)  # fmt: skip


def table_rows(
    sections: Sequence[Section], headlines: Mapping[str, Sequence[str]]
) -> list[list[str]]:
    """Cells of a table, its head first; of tasks with headline metrics those alone."""
    rows = [list(HEAD)]
    for one in sections:
        shots = one.get("num_fewshot")
        about = f"{one['items']}, {shots}-shot" if shots else str(one["items"])
        wanted = headlines.get(one["task"], ())
        for metric in one["metrics"]:
            if wanted and metric["metric"] not in wanted:
                continue
            name = metric["metric"] + (" ↓" if metric["higher_is_better"] is False else "")
            for rule, measured in metric["rules"].items():
                cost = one["rules"][rule]
                change = ""
                if "difference" in measured:
                    ends = measured["difference_interval"]
                    change = _with_interval(measured["difference"], ends, "+")
                rows.append(
                    [
                        f"{one['task']} ({about})",
                        name,
                        rule,
                        _with_interval(measured["value"], measured["interval"]),
                        change,
                        f"{cost['density']:.3f}",
                        f"{cost['bytes_per_token'] / 1e6:,.1f} MB",
                        f"{cost['bytes_of_dense']:.3f}",
                        f"{cost['tokens_per_answer']:.1f}",
                        f"{cost['sparse_tokens']:.0%}",
                    ]
                )
    return rows


def _with_interval(value: float, ends: Sequence[float], sign: str = "") -> str:
    largest = max(map(abs, (value, *ends)))
    form = ".3f" if largest < 10 else ".1f" if largest < 1e5 else ".2e"
    low, high = (f"{end:{sign}{form}}" for end in ends)
    return f"{value:{sign}{form}} [{low}, {high}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
