"""How sure a number is: 95 % intervals of means, of differences, and of correlations over pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from coreinfer.evaluation.continuations import standard_error

LEVEL = 0.95
RESAMPLES = 1000

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its interval; None where there are too few values for one."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def cells(self, name: str) -> dict[str, float | None]:
        """As three columns of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def mean(values: Sequence[float]) -> Estimate:
    """The mean, with Student's interval: for few values of about one spread, as windows are."""
    from scipy.stats import t

    centre = fmean(values)
    if len(values) < 2:
        return Estimate(centre, None, None)
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * standard_error(values)
    return Estimate(centre, centre - half, centre + half)


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The mean of a - b, measured on the same windows in the same order."""
    return mean([x - y for x, y in zip(a, b, strict=True)])


def pair_correlation(
    x: Matrix, y: Matrix, pairs: NDArray[np.bool_] | None = None, *, seed: int = 0
) -> Estimate:
    """Pearson's correlation of two measures of pairs, with a bootstrap interval over the items.

    Pairs that share an item are not independent, so items are drawn again, not pairs: an item
    drawn w_i times gives the pair (i, j) the weight w_i w_j; what would pair an item with its own
    copy is left out.

    Args:
        x, y: [n, n], symmetric; the diagonal is not looked at.
        pairs: [n, n], symmetric: which pairs count; None for all.
        seed: of the drawing.

    Returns:
        The percentile interval of RESAMPLES resamples; NaN where a measure does not vary.
    """
    count = x.shape[0]
    counted = np.ones_like(x) if pairs is None else pairs.astype(np.float64)
    np.fill_diagonal(counted := counted.copy(), 0.0)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    whole = _weighted_correlation(x, y, counted, np.ones((1, count)))[0]
    found = _weighted_correlation(x, y, counted, drawn.astype(np.float64))
    found = found[np.isfinite(found)]
    if not math.isfinite(whole) or found.size < RESAMPLES / 2:
        return Estimate(float(whole), None, None)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(whole), float(low), float(high))


def _weighted_correlation(x: Matrix, y: Matrix, counted: Matrix, weights: Matrix) -> Matrix:
    """Of the pairs, weighted by weights [R, n] of both their items: [R]."""

    def total(values: Matrix) -> Matrix:
        # Each pair stands in the matrix twice, which changes no ratio of sums.
        sums: Matrix = ((weights @ (values * counted)) * weights).sum(axis=1)
        return sums

    # Around the plain means, so that no sum of squares loses its digits.
    share = counted / counted.sum() if counted.any() else counted
    x, y = x - (x * share).sum(), y - (y * share).sum()
    pairs = total(np.ones_like(x))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = total(x) / pairs, total(y) / pairs
        covariance = total(x * y) / pairs - mean_x * mean_y
        spread_x = np.clip(total(x * x) / pairs - mean_x**2, 0, None)
        spread_y = np.clip(total(y * y) / pairs - mean_y**2, 0, None)
        product = np.sqrt(spread_x * spread_y)
        result: Matrix = np.where(product > 1e-15, covariance / product, np.nan)
    return result
