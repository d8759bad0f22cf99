"""Texts of two kinds, small settings and a question that is answered at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from coreinfer.analysis.materials import Materials
from coreinfer.analysis.question import Answer
from coreinfer.analysis.sections import Chart, Figure, Table
from coreinfer.analysis.settings import Settings
from coreinfer.analysis.texts import Source
from coreinfer.backends.hf.session import HfBackend
from tests.calibration.stores import random_store
from tests.tiny import tiny_backend

STORIES = tuple(
    f"The cat number {i} sat on the mat. It was warm and happy there. Nobody came {i} times."
    for i in range(40)
)
CODE = tuple(
    f"def f{i}(x): return x + {i}. Then we call it. The result is {i * 7}! Is it right?"
    for i in range(40)
)
SOURCES = (Source("stories", STORIES, {"n": 40}), Source("code", CODE, {"n": 40}))
SMALL = Settings(
    windows=4,
    prompt_tokens=24,
    continuation_tokens=5,
    alphas=(0.2, 0.4),
    keeps=(0.25, 0.5, 0.75),
    lengths=(2, 16),
    long_tokens=24,
    period=12,
    corpus_documents=6,
    document_tokens=24,
)


def materials(
    work: Path, settings: Settings = SMALL, model: str = "llama", *, calibrated: bool = False
) -> Materials:
    backend = tiny_backend(model)
    calibration = None
    if calibrated:
        sizes = backend.cost.num_neurons
        calibration = random_store(sizes=sizes, hidden=32, fingerprint=backend.fingerprint)
    return Materials(lambda: backend, SOURCES, settings, work, calibration=calibration)


class Counting:
    """A question that counts how often it was asked."""

    name: ClassVar[str] = "counting"
    title: ClassVar[str] = "How often <asked> & answered?"
    needs_model: ClassVar[bool] = True
    needs_sources: ClassVar[int] = 1

    def __init__(self, on_ask: Callable[[], None] = lambda: None) -> None:
        self.asked = 0
        self._on_ask = on_ask

    def windows(self, settings: Settings) -> Sequence[tuple[int, int]]:
        return [(settings.prompt_tokens, settings.continuation_tokens)]

    def ask(self, materials: Materials) -> Answer:
        self._on_ask()
        self.asked += 1
        rows = [
            {"layer": layer, "rule": rule, "kl": layer / 3 + len(rule), "low": None, "high": None}
            for rule in ("one", "two")
            for layer in range(4)
        ]
        table = Table.of("numbers", 'Numbers "of" <layers>.', rows)
        chart = Chart("lines", x="layer", y="kl", series="rule", low="low", high="high")
        return Answer("Counted.", [f"asked of {materials.backend.model_name}"],
                      [Figure(table, chart)])  # fmt: skip


def loads(backend: HfBackend) -> Callable[[], HfBackend]:
    return lambda: backend
