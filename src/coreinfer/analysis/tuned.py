"""The page of a tuning run: the front of quality against bytes, and what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from coreinfer.analysis.page import page
from coreinfer.analysis.sections import Cell, Chart, Figure, Section, Table
from coreinfer.files import replace_when_done
from coreinfer.tuning.goal import Measured
from coreinfer.tuning.result import Outcome, Point

TITLE = "Core neurons: settings for a budget"
LOSS = {
    "kl": "KL to dense, nats a token",
    "ppl": "rise of the perplexity over dense",
    "agreement": "likeliest tokens that are not the dense ones",
}
METHOD = (
    "First every rule with every stand-in, one keep for all layers; then what Optuna asks for "
    "after their results: rule, stand-in, their options and the profile of the budgets by layer, "
    "where layers that lose more alone get more. Of the best, bytes are moved to the layers where "
    "they are worth most, all layers being sparse. All of this on some of the prompts; the others "
    "are reported on. Beside what was chosen stand, at its bytes, the best setting with one keep "
    "for all layers, the best of which neurons are skipped where that was searched and does "
    "better, and the better of them with the first and last layers dense. Bytes are those of the "
    "MLPs' weights that decoding reads a token, the stand-in among them, relative to dense "
    "decoding."
)


def write_page(path: str | Path, outcome: Outcome, model: str, about: Mapping[str, str]) -> None:
    """Raises UserError if it cannot be written."""
    text = page([section(outcome, model)], about, TITLE)
    with replace_when_done(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def section(outcome: Outcome, model: str) -> Section:
    goal, loss = outcome.goal, LOSS[outcome.goal.metric]
    points = {"chosen": outcome.chosen, **outcome.rivals}
    compared = {name: point.candidate for name, point in points.items()}
    tried = Table.of(
        "tried",
        f"All {len(outcome.tried)} settings on the prompts to search with; lower and further left "
        "is better. The front: no other is as good in both.",
        [_row(kind, point, point.loss) for kind, point in _kinds(outcome)],
    )
    reported = Table.of(
        "report",
        f"The front on {outcome.prompts['report']} prompts that were not searched with; 95 % "
        "intervals.",
        [
            _row(kind, point, point.report)
            for kind, point in _kinds(outcome)
            if point.report is not None and kind not in ("tried", "one keep")
        ],
    )
    keeps = {name: one.keeps for name, one in compared.items()}
    by_layer = {"keep": _by_layer("keep", "What each layer keeps of its neurons.", keeps)}
    if any(one.actives for one in compared.values()):
        computed = {
            name: tuple(keep * one.active(layer) for layer, keep in enumerate(one.keeps))
            for name, one in compared.items()
        }
        by_layer["computed"] = _by_layer(
            "computed", "What a token computes whole of all neurons of a layer.", computed
        )
    limit = None if goal.limit is None else (str(goal), goal.limit)
    x = "share of the MLPs' bytes"
    return Section(
        question="tune",
        title=f"{goal}",
        subject=model,
        method=METHOD,
        findings=tuple(findings(outcome)),
        figures=(
            Figure(tried, Chart("scatter", x="mlp share", y="loss", series="kind", x_label=x,
                                y_label=loss, log_y=True, reference=limit,
                                emphasis="chosen")),
            Figure(reported, Chart("lines", x="mlp share", y="loss", series="kind", low="low",
                                   high="high", x_label=x, y_label=loss, reference=limit)),
            *(
                Figure(table, Chart("lines", x="layer", y=y, series="setting",
                                    y_label="share of the neurons"))
                for y, table in by_layer.items()
            ),
        ),
        settings={f"{part} prompts": count for part, count in outcome.prompts.items()},
        seconds=outcome.seconds,
    )  # fmt: skip


def _by_layer(what: str, caption: str, shares: Mapping[str, Sequence[float]]) -> Table:
    rows: list[dict[str, Cell]] = [
        {"layer": layer, "setting": name, what: share}
        for name, of_one in shares.items()
        for layer, share in enumerate(of_one)
    ]
    return Table.of(f"{what} by layer", caption, rows)


def findings(outcome: Outcome) -> Iterator[str]:
    goal, chosen = outcome.goal, outcome.chosen
    assert chosen.report is not None
    if not outcome.reached:
        yield f"{goal} was not reached; the closest point is what is called chosen here."
    yield (
        f"Chosen: {chosen.candidate.name}, {len(chosen.candidate.dense_layers)} layers dense; "
        f"{chosen.share:.3f} of the MLPs' bytes, "
        f"{chosen.bytes_per_token / outcome.dense_bytes_per_token:.3f} of all bytes a token."
    )
    yield (
        f"{goal.describe_loss(chosen.loss)} on {outcome.prompts['search']} prompts searched with, "
        f"{goal.describe_loss(chosen.report)} on {outcome.prompts['report']} others."
    )
    for name, point in outcome.rivals.items():
        assert point.report is not None
        yield (
            f"{name[0].upper()}{name[1:]} ({point.candidate.name}, {point.share:.3f} of the "
            f"bytes): {goal.describe_loss(point.loss)} and {goal.describe_loss(point.report)}; the "
            f"chosen one loses {gain(point, chosen):.0%} less on the others."
        )


def gain(rival: Point, chosen: Point) -> float:
    """By how much the loss on the prompts to report on falls."""
    assert rival.report is not None
    assert chosen.report is not None
    return 1 - chosen.report.mean / rival.report.mean if rival.report.mean > 0 else 0.0


def _kinds(outcome: Outcome) -> Iterator[tuple[str, Point]]:
    """All points with what they are, those that matter most last, so that they are drawn on top."""
    on_front = {point.candidate.key for point in outcome.front}
    rivals = {point.candidate.key: name for name, point in outcome.rivals.items()}
    special = {**rivals, outcome.chosen.candidate.key: "chosen"}
    for point in outcome.tried:
        if point.candidate.key not in on_front | special.keys():
            yield ("one keep" if point.stage == "one keep" else "tried"), point
    for point in outcome.front:
        if point.candidate.key not in special:
            yield "front", point
    for name, point in outcome.rivals.items():
        yield name, point
    yield "chosen", outcome.chosen


def _row(kind: str, point: Point, loss: Measured) -> dict[str, Cell]:
    return {
        "kind": kind,
        "mlp share": point.share,
        "loss": loss.mean,
        "low": loss.mean - 1.96 * loss.error,
        "high": loss.mean + 1.96 * loss.error,
        "stage": point.stage,
        "settings": point.candidate.name,
        "dense layers": len(point.candidate.dense_layers),
    }
