"""The tasks `perplexity` and `kl`: continuations of a text, window by window, kept as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from coreinfer.api import in_batches
from coreinfer.backends.base import Backend
from coreinfer.errors import UserError
from coreinfer.evaluation.answers import Answers, key_of
from coreinfer.evaluation.continuations import Quality, Setting, measure, windows
from coreinfer.evaluation.section import Cost, Metric, Section, section
from coreinfer.jsonl import not_utf8, open_to_read

TEXT_TASKS = ("perplexity", "kl")
TEXT_FILE = "wikitext2_raw_test.txt"  # of the data folder, unless another one is named
WINDOWS, PROMPT_TOKENS, CONTINUATION_TOKENS = 40, 200, 60


def read_text(path: Path) -> str:
    """Raises UserError if the file is missing, or no UTF-8."""
    with open_to_read(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path, raw[: error.start].count(b"\n") + 1)) from None


def run_text_task(
    task: str,
    backend: Backend,
    settings: Mapping[str, Setting],
    text: str,
    answers: Mapping[str, Answers],
    *,
    baseline: str,
    count: int = WINDOWS,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Section:
    """Measure windows of a text under every setting; both tasks share what is measured.

    Args:
        task: "perplexity" or "kl" (with the agreement of the likeliest token).
        settings: the rules; `baseline`, which is dense, is among them.
        answers: of each rule, what is known of windows already.
        count: windows, evenly spaced.

    Raises:
        UserError: if the text is too short, or a setting does not fit the model.
    """
    pieces = windows(
        backend,
        text,
        count=count,
        prompt_tokens=PROMPT_TOKENS,
        continuation_tokens=CONTINUATION_TOKENS,
    )
    keys = [key_of("window", piece.prompt, piece.continuation) for piece in pieces]
    done = 0
    for batch in in_batches(list(zip(keys, pieces, strict=True)), batch_size):
        missing = {
            name: setting
            for name, setting in settings.items()
            if any(key not in answers[name] for key, _ in batch)
        }
        for name, setting in missing.items():
            if name == baseline and len(missing) > 1:
                continue  # measured beside the others
            for found in measure(backend, [w for _, w in batch], {name: setting}, batch_size=999):
                _keep(answers[name], batch, found[name])
                if baseline in missing:
                    _keep(answers[baseline], batch, found["dense"])
        done += len(batch)
        on_progress(done, count)
    given = {name: [answers[name][key] for key in keys] for name in settings}
    cost = Cost()
    for name, rows in given.items():
        cost.add(name, rows)

    def column(field: str) -> dict[str, list[float]]:
        return {name: [row[field] for row in rows] for name, rows in given.items()}

    if task == "perplexity":
        metrics = [Metric("perplexity", column("nll"), _perplexity, higher_is_better=False)]
    else:
        metrics = [
            Metric("kl", column("kl"), higher_is_better=False),
            Metric("agreement", column("agreement")),
        ]
    about = {"prompt_tokens": PROMPT_TOKENS, "continuation_tokens": CONTINUATION_TOKENS}
    return section(task, metrics, cost, baseline=baseline, seed=seed, **about)


def _keep(answers: Answers, batch: list[Any], quality: Quality) -> None:
    names = [field.name for field in fields(Quality)]
    answers.add(
        {
            key: {name: getattr(quality, name)[row] for name in names}
            for row, (key, _) in enumerate(batch)
        }
    )


def _perplexity(nll: list[float]) -> float:
    return math.exp(fmean(nll))
