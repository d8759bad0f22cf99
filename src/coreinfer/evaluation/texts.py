"""The tasks `perplexity` and `kl`: continuations of a text, window by window, kept as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from coreinfer.api import in_batches
from coreinfer.backends.base import Backend
from coreinfer.evaluation.continuations import (
    Quality,
    Window,
    measure,
    sharing_a_prefill,
    windows,
)
from coreinfer.evaluation.rules import BASELINE, Rule
from coreinfer.evaluation.section import Metric, Section, cost_of, section
from coreinfer.journal import Entry, Journal, key_of

TEXT_TASKS = ("perplexity", "kl")
TEXT_FILE = "wikitext2_raw_test.txt"  # of the data folder, unless another one is named
WINDOWS, PROMPT_TOKENS, CONTINUATION_TOKENS = 40, 200, 60


def run_text_task(
    task: str,
    backend: Backend,
    rules: Mapping[str, Rule],
    text: str,
    answers: Journal,
    *,
    count: int = WINDOWS,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    **about: Any,
) -> Section:
    """Measure windows of a text under every rule; both tasks share what is measured.

    The first token of a continuation is left out: the dense prefill predicts it.

    Args:
        task: "perplexity" or "kl" (with the agreement of the likeliest token).
        rules: by name; the baseline is among them.
        answers: what is known of windows already.
        count: windows, evenly spaced.
        about: what else the section is to say.

    Raises:
        UserError: if the text is too short, or a rule does not fit the model.
    """
    pieces = windows(
        backend,
        text,
        count=count,
        prompt_tokens=PROMPT_TOKENS,
        continuation_tokens=CONTINUATION_TOKENS,
    )
    done = 0
    for batch in in_batches(pieces, batch_size):
        _measure_missing(backend, rules, batch, answers)
        done += len(batch)
        on_progress(done, count)
    given = {name: [answers[_key(rule, piece)] for piece in pieces] for name, rule in rules.items()}

    def column(field: str) -> dict[str, list[float]]:
        return {name: [row[field] for row in rows] for name, rows in given.items()}

    if task == "perplexity":
        metrics = [Metric("perplexity", column("nll"), _perplexity, higher_is_better=False)]
    else:
        metrics = [
            Metric("kl", column("kl"), higher_is_better=False),
            Metric("agreement", column("agreement")),
        ]
    costs = {name: cost_of(rows) for name, rows in given.items()}
    for cost in costs.values():  # the first token is not among those that are measured
        cost["sparse_tokens"] = float(cost["density"] < 1)
    return section(
        task,
        metrics,
        costs,
        baseline=BASELINE,
        seed=seed,
        prompt_tokens=PROMPT_TOKENS,
        continuation_tokens=CONTINUATION_TOKENS,
        **about,
    )


def _key(rule: Rule, window: Window) -> str:
    return key_of(rule.digest, "window", window.prompt, window.continuation)


def _measure_missing(
    backend: Backend, rules: Mapping[str, Rule], batch: Sequence[Window], answers: Journal
) -> None:
    missing = {
        name: rule
        for name, rule in rules.items()
        if any(_key(rule, window) not in answers for window in batch)
    }
    # Dense decoding is measured beside the others, whatever they are.
    others = {name: rule.setting for name, rule in missing.items() if name != BASELINE}
    for group in sharing_a_prefill(others) or [[]] * (BASELINE in missing):
        settings = {name: others[name] for name in group}
        for found in measure(backend, batch, settings, batch_size=len(batch)):
            for name in (BASELINE, *group):
                rows = {
                    _key(rules[name], window): _row(found[name], i, window)
                    for i, window in enumerate(batch)
                }
                answers.add(rows)


def _row(quality: Quality, row: int, window: Window) -> Entry:
    return {
        "nll": quality.nll[row],
        "kl": quality.kl[row],
        "agreement": quality.agreement[row],
        "density": quality.density[row],
        "bytes_per_token": quality.bytes_per_token[row],
        "tokens": len(window.continuation) - 1,
    }


def _perplexity(nll: list[float]) -> float:
    return math.exp(fmean(nll))
