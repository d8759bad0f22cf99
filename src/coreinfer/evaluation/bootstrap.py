"""Confidence intervals by the paired percentile bootstrap over items (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
FEW_RESAMPLES = 100  # of metrics that take long to aggregate, as lm-eval does
LEVEL = 0.95

Aggregate = Callable[[list[Any]], float]


def resampled(
    items: Sequence[Any], aggregate: Aggregate, *, count: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """The metric of `count` draws of as many items, with replacement: [count].

    Draws depend on the seed and the number of items alone, so what two rules did with the same
    items is resampled alike: differences of the results are paired.
    """
    draws = np.random.default_rng(seed).integers(0, len(items), size=(count, len(items)))
    if aggregate is fmean:
        means: NDArray[np.float64] = np.asarray(items, dtype=np.float64)[draws].mean(axis=1)
        return means
    return np.array([aggregate([items[i] for i in draw]) for draw in draws], dtype=np.float64)


def interval(values: NDArray[np.float64]) -> list[float]:
    """[low, high], between which the middle 95 % of the resampled values lie."""
    tail = 50 * (1 - LEVEL)
    return [float(value) for value in np.percentile(values, [tail, 100 - tail])]
