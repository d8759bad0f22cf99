"""How many bytes each layer gets: the least error in total that a byte budget can buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from coreinfer.errors import UserError


@dataclass(frozen=True)
class Curve:
    """What one layer loses at what it may read.

    Attributes:
        costs: bytes, ascending, at least one; the first is the least that the layer can do with.
        errors: the loss at each of them, not negative.
    """

    costs: tuple[float, ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.costs or len(self.costs) != len(self.errors):
            raise ValueError(f"{len(self.costs)} costs, {len(self.errors)} errors")
        if any(b <= a for a, b in pairwise(self.costs)):
            raise ValueError(f"costs must ascend, got {self.costs}")

    def smooth(self, steps: int = 8) -> Curve:
        """The same with `steps` points for each piece.

        The loss is about the square of how far the layer's output is off, so it is the square
        root that is interpolated; the best share of a layer then need not be a measured point.
        """
        points = list(zip(self.costs, self.errors, strict=True))
        made = []
        for (a, x), (b, y) in pairwise(points):
            x, y = sqrt(max(x, 0.0)), sqrt(max(y, 0.0))
            for part in (step / steps for step in range(steps)):
                made.append((a + part * (b - a), (x + part * (y - x)) ** 2))
        made.append(points[-1])
        return Curve(tuple(cost for cost, _ in made), tuple(error for _, error in made))

    def hull(self) -> Curve:
        """The largest convex curve below it that never rises: its corners, the cheapest first."""
        corners: list[tuple[float, float]] = []
        for point in zip(self.costs, self.errors, strict=True):
            if corners and point[1] >= corners[-1][1]:
                continue  # dearer and no better
            while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(
                corners[-1], point
            ):
                corners.pop()
            corners.append(point)
        return Curve(tuple(cost for cost, _ in corners), tuple(error for _, error in corners))

    def at(self, cost: float) -> float:
        """The error at a cost, interpolated linearly; that of the nearest end outside."""
        if cost <= self.costs[0]:
            return self.errors[0]
        for i in range(len(self.costs) - 1):
            if cost <= self.costs[i + 1]:
                part = (cost - self.costs[i]) / (self.costs[i + 1] - self.costs[i])
                return self.errors[i] + part * (self.errors[i + 1] - self.errors[i])
        return self.errors[-1]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def allocate(curves: Sequence[Curve], budget: float) -> list[float]:
    """The bytes of each layer: the errors' sum is the least that `budget` bytes in total allow.

    The pieces of the convex hulls are bought in the order of what a byte of them gains, the last
    one in part: the minimiser of the Lagrangian sum(error) + lambda * sum(bytes) at the lambda
    that spends the budget. It is exact where the curves are convex and straight between their
    points; elsewhere no point of the curves themselves does better than the hulls' minimum. What
    gains nothing is not bought, so less than the budget may be spent.

    Args:
        curves: one a layer.
        budget: bytes in total.

    Raises:
        UserError: if the budget is less than the layers' least.
    """
    hulls = [curve.hull() for curve in curves]
    shares = [hull.costs[0] for hull in hulls]
    left = budget - sum(shares)
    if left < -1e-9 * max(budget, 1.0):
        raise UserError(f"{budget:,.0f} bytes are too few: at least {sum(shares):,.0f} are read")
    pieces = sorted(
        (_slope((a, x), (b, y)), layer, b - a)
        for layer, hull in enumerate(hulls)
        for (a, x), (b, y) in pairwise(zip(hull.costs, hull.errors, strict=True))
    )
    for _slope_of_piece, layer, size in pieces:
        bought = min(size, left)
        if bought <= 0:
            break
        shares[layer] += bought
        left -= bought
    return shares
