"""Random calibration stores of a few layers, and builds on tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coreinfer.backends.base import Backend
from coreinfer.building.calibration import calibrate
from coreinfer.building.settings import CalibrationSettings
from coreinfer.calibration.prediction import LayerPrediction
from coreinfer.calibration.store import CalibrationStore
from coreinfer.core.layer_errors import LayerErrors
from coreinfer.core.statistics import LayerStatistics
from coreinfer.jsonl import refuse


def random_store(
    seed: int = 0,
    *,
    sizes: Sequence[int] = (10, 10, 10),
    hidden: int = 4,
    rank: int = 3,
    model: str = "tiny",
    fingerprint: str = "f" * 64,
) -> CalibrationStore:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    priors = []
    for size in sizes:
        stats = LayerStatistics.zeros(size, hidden)
        stats.update(normal(9, hidden), normal(9, size), 0.4)
        stats.update_residual(normal(9, size))
        priors.append(stats)
    errors = torch.rand(len(sizes), 3, generator=generator, dtype=torch.float64)
    return CalibrationStore(
        model=model,
        model_fingerprint=fingerprint,
        alpha=0.4,
        predictions=[
            LayerPrediction(normal(hidden), normal(hidden, rank), normal(1 + rank, size))
            for size in sizes
        ],
        statistics=priors,
        layer_errors=LayerErrors((0.2, 0.5, 1.0), errors.sort(descending=True).values),
        corpus={"name": "c", "documents": 9},
    )


def build(backend: Backend, corpus: Path | None, out: Path, **options: Any) -> CalibrationStore:
    """A store, with the settings of most tests."""
    names = CalibrationSettings.__dataclass_fields__
    chosen = {name: options.pop(name) for name in list(options) if name in names}
    made_with = {"rank": 6, "max_tokens": 40, "error_documents": 2, "own_tokens": 100, **chosen}
    others: dict[str, Any] = {"on_skip": refuse, "progress": False, "checkpoint_seconds": 0.0}
    return calibrate(backend, corpus, out, CalibrationSettings(**made_with), **others | options)
