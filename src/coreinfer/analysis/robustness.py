"""Question 5: domain shift, long generation, typing errors, a change of topic, short prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import ClassVar

from coreinfer.analysis.disturbances import typos
from coreinfer.analysis.intervals import difference, mean
from coreinfer.analysis.long_generation import courses
from coreinfer.analysis.materials import ALPHA, Materials
from coreinfer.analysis.question import Answer
from coreinfer.analysis.sections import Cell, Chart, Figure, Table
from coreinfer.analysis.settings import Settings
from coreinfer.analysis.texts import ending, window_of
from coreinfer.core.measures import mean_overlap
from coreinfer.evaluation.continuations import Quality, Window
from coreinfer.evaluation.overlap import core_sets

RULES = ("stability", "similarity", "impact", "impact+linear", "static", "random")
TYPO_RATES = (0.0, 0.03, 0.1, 0.3)
SHORT = (1, 2, 4, 8)
DENSE_TOKENS = (1, 8)
METHOD = (
    "Domain shift: the store of each kind of text serves prompts of each. Long generation: real "
    "text goes on for long after the prompt, and KL is taken by distance from it, with the set of "
    "the prompt to the end, with a set chosen anew each period after some dense steps, and with "
    "all that was said read again densely. Typing errors: letters of the prompt left out, doubled, "
    "replaced or swapped. Change of topic: the continuation of another kind of text follows. "
    "Short prompts: the last few tokens before a continuation. KL is always taken between dense "
    "and sparse decoding after the same prompt. All rules keep the same number of neurons, but the "
    "one that skips half of them at each token: it keeps more, to read the same bytes."
)


class Robustness:
    """What sparse decoding costs where its assumption, that the prompt tells, is strained."""

    name: ClassVar[str] = "robustness"
    title: ClassVar[str] = "Robustness: other domains, long answers, noise, topics, short prompts"
    needs_model: ClassVar[bool] = True
    needs_sources: ClassVar[int] = 2

    def windows(self, settings: Settings) -> Sequence[tuple[int, int]]:
        s = settings
        return [(s.prompt_tokens, max(long_continuation(s), s.continuation_tokens))]

    def ask(self, materials: Materials) -> Answer:
        findings: list[str] = []
        figures = [
            domain_shift(materials, findings),
            long_generation(materials, findings),
            noise(materials, findings),
            topic_change(materials, findings),
            short_prompts(materials, findings),
        ]
        return Answer(METHOD, findings, figures)


def measured(materials: Materials, windows: Sequence[Window]) -> dict[str, Quality]:
    """RULES, and what else `materials.rules` makes, on some windows."""
    settings = materials.rules(RULES)
    results = materials.measure(windows, settings)
    return {rule: results[rule] for rule in settings}


def domain_shift(materials: Materials, findings: list[str]) -> Figure:
    """Similarity with the store of each kind of text, on each; beside stability and random."""
    stores = {one.name: materials.make_store(ALPHA, [one]) for one in materials.sources}
    cells: list[dict[str, Cell]] = []
    own: list[float] = []
    other: list[float] = []
    prompt: list[float] = []
    for name, windows in materials.windows().items():
        materials.on_progress(f"robustness: stores of every kind on {name}")
        settings = {
            f"store of {kind}": materials.setting("similarity", store=store)
            for kind, store in stores.items()
        }
        settings |= materials.rules(("stability", "impact", "random"))
        results = materials.measure(windows, settings)
        cells += [
            {"prompts": name, "core set from": key, **materials.cells(results[key])}
            for key in settings
        ]
        own += results[f"store of {name}"].kl
        others = [results[f"store of {kind}"].kl for kind in stores if kind != name]
        other += [fmean(kl) for kl in zip(*others, strict=True)]
        prompt += results["stability"].kl
    findings.append(
        f"Domain shift: KL {fmean(own):.2f} with the store of the prompt's own kind, "
        f"{fmean(other):.2f} with those of others (difference {difference(other, own)}), "
        f"{fmean(prompt):.2f} with the prompt's own counts."
    )
    caption = (
        f"KL to dense where the cluster store is of one kind of text and the prompts of another; "
        f"{materials.settings.windows} windows each."
    )
    return Figure(
        Table.of("domain-shift", caption, cells),
        Chart("grid", x="core set from", y="prompts", value="kl"),
    )


def long_continuation(settings: Settings) -> int:
    """Whole periods, in tokens."""
    return settings.long_tokens // settings.period * settings.period


def long_generation(materials: Materials, findings: list[str]) -> Figure:
    """KL by distance from the prompt, by policy, for the paper's rule, for impact, and for what
    else `materials.rules` makes."""
    s = materials.settings
    tokens = long_continuation(s)
    windows = materials.interleaved(continuation_tokens=tokens)
    dense_tokens = [count for count in DENSE_TOKENS if count < s.period]
    cells: list[dict[str, Cell]] = []
    for rule, setting in materials.rules(("stability", "impact")).items():
        materials.on_progress(f"robustness: {tokens} tokens, {rule}")
        found = courses(
            materials.backend, windows, setting, period=s.period, dense_tokens=dense_tokens
        )  # fmt: skip
        for policy, course in found.items():
            cells += [
                {
                    "rule": rule,
                    "chosen anew": policy,
                    "tokens from the prompt": s.period * (number + 1),
                    **mean(kl).cells("kl"),
                    "dense tokens": course.dense_share,
                }
                for number, kl in enumerate(course.kl)
            ]
        never = found["never"].kl
        findings.append(
            f"Long generation, {rule}: KL {fmean(never[0]):.2f} in the first {s.period} tokens, "
            f"{fmean(never[-1]):.2f} in the last (difference {difference(never[-1], never[0])})."
        )
        for policy, course in found.items():
            if policy != "never":
                findings.append(
                    f"Long generation, {rule}, {policy}: KL in the last {s.period} tokens less "
                    f"that of never choosing anew: {difference(course.kl[-1], never[-1])}."
                )
    caption = (
        f"KL to dense by distance from a prompt of {s.prompt_tokens} tokens, means over periods of "
        f"{s.period}; {len(windows)} windows."
    )
    return Figure(
        Table.of("long-generation", caption, cells),
        Chart("lines", x="tokens from the prompt", y="kl", series="chosen anew", panel="rule",
              low="kl_low", high="kl_high", y_label="KL to dense, nats"),
    )  # fmt: skip


def noise(materials: Materials, findings: list[str]) -> Figure:
    """KL, and overlap of the core set with that of the clean prompt, by rate of typing errors."""
    s = materials.settings
    clean = materials.interleaved()
    selector = materials.setting("stability").selector
    before = core_sets(materials.backend, [w.prompt for w in clean], selector)
    results: dict[Cell, dict[str, Quality]] = {}
    for rate in TYPO_RATES:
        materials.on_progress(f"robustness: typing errors at {rate:g}")
        noisy = [
            window_of(
                materials.backend, typos(w.text, rate, s.seed + i), s.prompt_tokens, w.continuation
            )
            for i, w in enumerate(clean)
        ]
        results[f"{rate:.0%}"] = measured(materials, noisy)
        after = core_sets(materials.backend, [w.prompt for w in noisy], selector)
        shared = [mean_overlap(a.layers, b.layers) for a, b in zip(before, after, strict=True)]
        findings.append(
            f"Typing errors in {rate:.0%} of the letters: overlap of the core set with the clean "
            f"prompt's {mean(shared)}; KL of stability "
            f"{fmean(results[f'{rate:.0%}']['stability'].kl):.2f}, of impact "
            f"{fmean(results[f'{rate:.0%}']['impact'].kl):.2f}."
        )
    caption = f"KL to dense by typing errors in the prompt; {len(clean)} windows, keep {s.keep:g}."
    return _bars("noise", caption, "typing errors", materials.rows("typing errors", results))


def topic_change(materials: Materials, findings: list[str]) -> Figure:
    """KL where the text goes on as it was, and where another kind of text follows."""
    by_source = list(materials.windows().values())
    share = max(2, -(-materials.settings.windows // len(by_source)))
    same = [w for windows in by_source for w in windows[:share]]
    # The kinds shifted by one: what follows is always of another kind than the prompt.
    others = [w for windows in (*by_source[1:], by_source[0]) for w in windows[:share]]
    changed = [replace(a, continuation=b.continuation) for a, b in zip(same, others, strict=True)]
    results: dict[Cell, dict[str, Quality]] = {}
    for name, windows in (("goes on", same), ("changes", changed)):
        materials.on_progress(f"robustness: the topic {name}")
        results[name] = measured(materials, windows)
    for rule in results["changes"]:
        cost = difference(results["changes"][rule].kl, results["goes on"][rule].kl)
        findings.append(f"Topic changes after the prefill, {rule}: KL rises by {cost}.")
    caption = f"KL to dense where the topic goes on and where it changes; {len(same)} windows."
    return _bars("topic", caption, "the topic", materials.rows("the topic", results))


def short_prompts(materials: Materials, findings: list[str]) -> Figure:
    """KL after prompts of a few tokens."""
    windows = materials.interleaved()
    results: dict[Cell, dict[str, Quality]] = {}
    for length in SHORT:
        materials.on_progress(f"robustness: prompts of {length} tokens")
        results[length] = measured(
            materials, [ending(materials.backend, w, length) for w in windows]
        )
        best = min(results[length], key=lambda rule: fmean(results[length][rule].kl))
        findings.append(
            f"Prompts of {length} tokens: best is {best} (KL {fmean(results[length][best].kl):.2f})"
            f", stability {fmean(results[length]['stability'].kl):.2f}, random "
            f"{fmean(results[length]['random'].kl):.2f}."
        )
    caption = f"KL to dense after very short prompts; {len(windows)} windows."
    return _bars("short", caption, "prompt tokens", materials.rows("prompt tokens", results))


def _bars(name: str, caption: str, x: str, cells: Sequence[Mapping[str, Cell]]) -> Figure:
    return Figure(
        Table.of(name, caption, cells),
        Chart("bars", x=x, y="kl", series="rule", low="kl_low", high="kl_high",
              y_label="KL to dense, nats"),
    )  # fmt: skip
