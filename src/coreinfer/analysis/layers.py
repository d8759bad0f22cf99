"""Question 3: stability of core neurons by layer, and what budgets per layer gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

from coreinfer.analysis.intervals import difference, mean
from coreinfer.analysis.materials import Materials
from coreinfer.analysis.question import Answer
from coreinfer.analysis.sections import Cell, Chart, Figure, Table
from coreinfer.analysis.settings import Settings
from coreinfer.core.measures import ReadCost, overlap
from coreinfer.evaluation.continuations import Quality, Setting, Window
from coreinfer.evaluation.overlap import core_sets, growing_sets, random_overlap
from coreinfer.tuning.budgets import Curve, allocate

RULES = ("stability", "impact")
BUDGETS = ("equal", "half way", "by layer")
NEXT = 64  # tokens that follow: what decoding will need
METHOD = (
    "By layer: the overlap (Jaccard) of the core set of a prompt with that of its longest version, "
    f"and with that of the {NEXT} tokens that follow it, which is what decoding needs. Then the "
    "error of each layer: KL to dense with that layer alone sparse. From these errors, measured "
    "on half of the windows, budgets are given out so that their sum is that of equal ones. They, "
    "equal ones and the means of both (half way) are compared on the other half, at the same bytes."
)


class Layers:
    """Overlap along the prompt and error, layer by layer; equal against given-out budgets."""

    name: ClassVar[str] = "layers"
    title: ClassVar[str] = "Stability of core neurons by layer, and what a budget per layer gains"
    needs_model: ClassVar[bool] = True
    needs_sources: ClassVar[int] = 1

    def windows(self, settings: Settings) -> Sequence[tuple[int, int]]:
        s = settings
        return [(max(s.lengths), NEXT), (s.prompt_tokens, s.continuation_tokens)]

    def ask(self, materials: Materials) -> Answer:
        s = materials.settings
        growth = stability(materials)
        learn, test = halves(materials)
        errors = layer_errors(materials, learn)
        budgets, compared = budgets_compared(materials, errors, test)
        by_layer = Table.of(
            "stability-by-layer",
            f"Overlap of the core set of {max(s.lengths)} tokens with that of the next {NEXT}, by "
            f"layer; keep {s.keep:g}, {len(learn) + len(test)} passages.",
            [row for row in growth if row["tokens"] == max(s.lengths) and row["with"] == "next"],
        )
        along = Table.of(
            "stability-by-length",
            f"Overlap of the core set after some tokens, mean over layers; keep {s.keep:g}.",
            along_the_prompt(growth),
        )
        error = Table.of(
            "error-by-layer",
            f"KL to dense with one layer sparse, impact; {len(learn)} windows.",
            [
                {"layer": layer, "keep": f"keep {keep:g}", **mean(kl).cells("kl")}
                for layer, by_keep in errors.items()
                for keep, kl in by_keep.items()
            ],
        )
        shares = Table.of(
            "budgets", "What share of its neurons each layer keeps.",
            [
                {"layer": layer, "mean keep": f"{keep:g}", "budget": share}
                for keep, by_layer_ in budgets.items()
                for layer, share in by_layer_.items()
            ],
        )  # fmt: skip
        gains = Table.of(
            "gain",
            f"KL with equal and with given-out budgets at the same bytes; {len(test)} windows that "
            "the budgets were not made from.",
            [
                {"mean keep": keep, "budgets": kind, **materials.cells(quality)}
                for keep, by_kind in compared.items()
                for kind, quality in by_kind.items()
            ],
        )
        chance = ("random sets", random_overlap(s.keep))
        ends: Any = {"low": "overlap_low", "high": "overlap_high"}
        return Answer(
            METHOD,
            list(findings(by_layer, error, compared)),
            [
                Figure(by_layer, Chart("lines", x="layer", y="overlap", series="rule",
                                       y_label="Jaccard", reference=chance, **ends)),
                Figure(along, Chart("lines", x="tokens", y="overlap", series="rule", panel="with",
                                    x_label="tokens read", y_label="Jaccard", log_x=True,
                                    reference=chance, **ends)),
                Figure(error, Chart("lines", x="layer", y="kl", series="keep", low="kl_low",
                                    high="kl_high", y_label="KL to dense, nats")),
                Figure(shares, Chart("lines", x="layer", y="budget", series="mean keep",
                                     y_label="share of the neurons kept")),
                Figure(gains, Chart("bars", x="mean keep", y="kl", series="budgets", low="kl_low",
                                    high="kl_high", y_label="KL to dense, nats")),
            ],
        )  # fmt: skip


def stability(materials: Materials) -> list[dict[str, Cell]]:
    """Overlaps by rule, layer, tokens read and what with, each with its interval over passages."""
    s, backend = materials.settings, materials.backend
    passages = materials.interleaved(prompt_tokens=max(s.lengths), continuation_tokens=NEXT)
    found: dict[tuple[str, str, int, int], list[float]] = {}
    for rule in RULES:
        selector = materials.setting(rule, dense_layers=()).selector
        for number, window in enumerate(passages, start=1):
            materials.on_progress(f"layers: {rule}, passage {number} of {len(passages)}")
            sets = growing_sets(backend, window.prompt, s.lengths, selector)
            (following,) = core_sets(backend, [window.continuation], selector)
            for length, one in zip(s.lengths, sets, strict=True):
                for name, other in (("whole", sets[-1]), ("next", following)):
                    for layer, shared in overlap(one.layers, other.layers).items():
                        found.setdefault((rule, name, length, layer), []).append(shared)
    return [
        {"rule": rule, "with": name, "tokens": length, "layer": layer,
         **mean(values).cells("overlap")}
        for (rule, name, length, layer), values in found.items()
    ]  # fmt: skip


def along_the_prompt(growth: Sequence[Mapping[str, Cell]]) -> list[dict[str, Cell]]:
    """Means over the layers, with the spread of the layers' means as the interval."""
    groups: dict[tuple[str, str, int], list[float]] = {}
    for row in growth:
        key = (str(row["rule"]), str(row["with"]), int(row["tokens"] or 0))
        groups.setdefault(key, []).append(float(row["overlap"] or 0.0))
    return [
        {
            "rule": rule,
            "with": f"with the {'whole prompt' if name == 'whole' else f'next {NEXT} tokens'}",
            "tokens": tokens,
            "overlap": fmean(values),
            "overlap_low": min(values),
            "overlap_high": max(values),
        }
        for (rule, name, tokens), values in groups.items()
    ]


def halves(materials: Materials) -> tuple[list[Window], list[Window]]:
    """Windows to learn from and windows to measure on, of all sources alike."""
    learn: list[Window] = []
    test: list[Window] = []
    for windows in materials.windows(count=2 * materials.settings.windows).values():
        learn += windows[::2]
        test += windows[1::2]
    share = len(materials.sources)
    return learn[::share], test[::share]


def layer_errors(
    materials: Materials, windows: Sequence[Window]
) -> dict[int, dict[float, list[float]]]:
    """For each sparse layer and keep, KL to dense of each window with that layer alone sparse."""
    every = set(range(materials.num_layers))
    settings = {
        f"{layer}/{keep}": materials.setting(
            "impact", keep, dense_layers=tuple(sorted(every - {layer}))
        )
        for layer in materials.sparse_layers
        for keep in materials.settings.keeps
    }
    materials.on_progress(f"layers: {len(settings)} layers and keeps, one at a time")
    measured = materials.measure(windows, settings)
    return {
        layer: {keep: measured[f"{layer}/{keep}"].kl for keep in materials.settings.keeps}
        for layer in materials.sparse_layers
    }


def budgets_compared(
    materials: Materials,
    errors: Mapping[int, Mapping[float, Sequence[float]]],
    windows: Sequence[Window],
) -> tuple[dict[float, dict[int, float]], dict[float, dict[str, Quality]]]:
    """Budgets for each mean keep, and what equal ones and these cost."""
    keeps = materials.settings.keeps[1:-1] or materials.settings.keeps
    budgets = {keep: given_out(materials.backend.cost, errors, keep) for keep in keeps}
    settings: dict[str, Setting] = {}
    for keep in keeps:
        settings[f"{keep}/equal"] = materials.setting("impact", keep)
        half_way = {layer: (share + keep) / 2 for layer, share in budgets[keep].items()}
        settings[f"{keep}/half way"] = materials.setting("impact", keep, budgets=half_way)
        settings[f"{keep}/by layer"] = materials.setting("impact", keep, budgets=budgets[keep])
    materials.on_progress("layers: equal budgets against budgets by layer")
    measured = materials.measure(windows, settings)
    return budgets, {keep: {kind: measured[f"{keep}/{kind}"] for kind in BUDGETS} for keep in keeps}


def given_out(
    cost: ReadCost, errors: Mapping[int, Mapping[float, Sequence[float]]], keep: float
) -> dict[int, float]:
    """The share each sparse layer keeps, of as many bytes as if each kept `keep`."""
    bytes_of = {layer: cost.per_neuron[layer] * cost.num_neurons[layer] for layer in errors}
    curves = []
    for layer, by_keep in errors.items():
        points = {share: fmean(kl) for share, kl in by_keep.items()} | {1.0: 0.0}
        costs = tuple(share * bytes_of[layer] for share in points)
        curves.append(Curve(costs, tuple(points.values())).smooth())
    spent = allocate(curves, keep * sum(bytes_of.values()))
    return {
        layer: min(part / bytes_of[layer], 1.0) for layer, part in zip(errors, spent, strict=True)
    }


def findings(
    by_layer: Table, error: Table, compared: Mapping[float, Mapping[str, Quality]]
) -> Iterator[str]:
    for rule in RULES:
        rows = [
            (float(value or 0), layer)
            for name, layer, value in zip(
                by_layer.column("rule"), by_layer.column("layer"), by_layer.column("overlap"),
                strict=True,
            )
            if name == rule
        ]  # fmt: skip
        (low, at_low), (high, at_high) = min(rows), max(rows)
        yield (
            f"{rule}: overlap with the next tokens' set is {fmean(v for v, _ in rows):.2f} on "
            f"average, from {low:.2f} (layer {at_low}) to {high:.2f} (layer {at_high})."
        )
    least = error.column("keep")[0]
    rows = sorted(
        (
            (float(kl or 0), layer)
            for layer, keep, kl in zip(
                error.column("layer"), error.column("keep"), error.column("kl"), strict=True
            )
            if keep == least
        ),
        reverse=True,
    )
    total = sum(kl for kl, _ in rows)
    top = rows[:3]
    yield (
        f"At {least}, layers {', '.join(str(layer) for _, layer in top)} make "
        f"{sum(kl for kl, _ in top) / total if total else 0:.0%} of the sum of all layers' errors."
    )
    for keep, by_kind in compared.items():
        equal = by_kind["equal"].kl
        for kind in BUDGETS[1:]:
            kl = by_kind[kind].kl
            yield (
                f"Mean keep {keep:g}: KL {fmean(equal):.3f} with equal budgets, {fmean(kl):.3f} "
                f"{kind}; the difference is {difference(kl, equal)}."
            )
