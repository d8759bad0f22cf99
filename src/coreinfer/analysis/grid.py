"""Question 1: quality against alpha, beta and gamma, the whole grid, by kind of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from statistics import fmean
from typing import ClassVar

from coreinfer.analysis.intervals import difference
from coreinfer.analysis.materials import Materials
from coreinfer.analysis.question import Answer
from coreinfer.analysis.sections import Cell, Chart, Figure, Table
from coreinfer.analysis.settings import Settings
from coreinfer.evaluation.continuations import Quality

Key = tuple[str, float, float]  # rule, alpha, keep

METHOD = (
    "The stability rule has alpha and beta, the similarity rule the alpha of its store and gamma; "
    "neither looks at the other's parameter, so alpha x beta and alpha x gamma are the whole grid. "
    "Each cell is the KL divergence from dense decoding on continuations of the same windows. The "
    "store of each alpha is made from other documents of the same kinds."
)


class Grid:
    """KL of stability over alpha x beta, and of similarity over alpha x gamma."""

    name: ClassVar[str] = "grid"
    title: ClassVar[str] = "Quality against alpha, beta and gamma"
    needs_model: ClassVar[bool] = True
    needs_sources: ClassVar[int] = 1

    def windows(self, settings: Settings) -> Sequence[tuple[int, int]]:
        return [(settings.prompt_tokens, settings.continuation_tokens)]

    def ask(self, materials: Materials) -> Answer:
        s = materials.settings
        rows: list[dict[str, Cell]] = []
        results: dict[str, dict[Key, Quality]] = {}
        windows = materials.windows()
        for alpha in s.alphas:
            store = materials.make_store(alpha, materials.sources)
            settings = {
                f"{rule}/{keep}": materials.setting(rule, keep, store)
                for rule, keep in product(("stability", "similarity"), s.keeps)
            }
            for name, texts in windows.items():
                materials.on_progress(f"grid: alpha {alpha:g}, {name}")
                measured = materials.measure(texts, settings)
                for rule, keep in product(("stability", "similarity"), s.keeps):
                    quality = measured[f"{rule}/{keep}"]
                    results.setdefault(name, {})[(rule, alpha, keep)] = quality
                    rows.append(
                        {
                            "text": name,
                            "rule": rule,
                            "panel": f"{name}: {rule}",
                            "alpha": alpha,
                            "beta or gamma": keep,
                            **materials.cells(quality),
                        }
                    )
        rows.sort(key=lambda row: (list(windows).index(str(row["text"])), str(row["rule"])))
        caption = (
            f"KL to dense decoding over the whole grid, {s.windows} windows of {s.prompt_tokens} + "
            f"{s.continuation_tokens} tokens a kind of text; smaller is better."
        )
        table = Table.of("grid", caption, rows)
        chart = Chart(
            "grid", x="beta or gamma", y="alpha", value="kl", panel="panel",
            x_label="beta (stability) or gamma (similarity)", y_label="alpha",
        )  # fmt: skip
        return Answer(METHOD, list(findings(results, s.alphas, s.keeps)), [Figure(table, chart)])


def findings(
    results: dict[str, dict[Key, Quality]], alphas: Sequence[float], keeps: Sequence[float]
) -> Iterator[str]:
    """What alpha matters, which is best, and which of the two rules wins where."""
    for text, cells in results.items():
        for rule in ("stability", "similarity"):
            by_alpha = {
                alpha: fmean(fmean(cells[(rule, alpha, keep)].kl) for keep in keeps)
                for alpha in alphas
            }
            best, worst = min(by_alpha, key=by_alpha.__getitem__), max(
                by_alpha, key=by_alpha.__getitem__
            )  # fmt: skip
            yield (
                f"{text}, {rule}: mean KL over the keeps is least at alpha {best:g} "
                f"({by_alpha[best]:.2f}), most at {worst:g} ({by_alpha[worst]:.2f})."
            )
        for keep in keeps:
            best_of = {
                rule: min(
                    (cells[(rule, alpha, keep)] for alpha in alphas), key=lambda q: fmean(q.kl)
                )
                for rule in ("stability", "similarity")
            }
            lead = difference(best_of["similarity"].kl, best_of["stability"].kl)
            yield (
                f"{text}, keep {keep:g}: similarity's KL less stability's, each at its best alpha: "
                f"{lead}."
            )
