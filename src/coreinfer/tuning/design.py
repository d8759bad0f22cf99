"""A design: rule, stand-in and the profile of the budgets; with a byte budget, a candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

from coreinfer.core.layer_errors import LayerErrors
from coreinfer.errors import UserError
from coreinfer.tuning.budgets import Curve, allocate
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.prices import Prices

DIGITS = 6  # of a keep: enough for round(keep * D) to be the number of neurons that was meant
FINENESS = 32  # pieces of an error curve between two measured keeps


@dataclass(frozen=True)
class Profile:
    """Which layers get how much, whatever there is to give.

    A layer's loss at keep k is taken to be measured(k) ** spread * (1 - k) ** (2 - 2 * spread)
    * exp(weight): with spread 0 and no weights all layers are alike, with spread 1 the loss is what
    was measured of each layer alone. Layers add up otherwise in a model that has all of them
    sparse, which is what the other numbers are for.

    Attributes:
        first, last: so many layers at the beginning and at the end stay dense.
        spread: how far the measured errors are followed, from 0.
        slope, bend: log-weight along the depth: slope * x + bend * (x^2 - 1/3), x from -1 to 1.
        weights: further log-weights, a layer each; empty for none.
    """

    first: int = 0
    last: int = 0
    spread: float = 0.0
    slope: float = 0.0
    bend: float = 0.0
    weights: tuple[float, ...] = ()

    @property
    def is_level(self) -> bool:
        """Whether all layers that are not dense keep the same fraction."""
        return not (self.spread or self.slope or self.bend or any(self.weights))

    def weight(self, layer: int, layers: int) -> float:
        x = 2 * layer / (layers - 1) - 1 if layers > 1 else 0.0
        own = self.weights[layer] if self.weights else 0.0
        return self.slope * x + self.bend * (x * x - 1 / 3) + own


@dataclass(frozen=True)
class Design:
    """All of a candidate but how many bytes it may read; the names are those of `Candidate`."""

    selector: str
    rule: Mapping[str, Any] = field(default_factory=dict)
    stand_in: str = "none"
    fit: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile = Profile()


@dataclass(frozen=True)
class Planner:
    """Makes candidates that read no more than they may.

    Attributes:
        prices: of neurons and stand-ins.
        errors: what each layer loses alone.
    """

    prices: Prices
    errors: LayerErrors

    @property
    def num_layers(self) -> int:
        return len(self.prices.cost.num_neurons)

    def candidate(self, design: Design, share: float) -> Candidate:
        """The design at `share` of the dense MLPs' bytes, or less by a part of a neuron.

        Raises:
            UserError: if so few bytes do not pay for its dense layers, its stand-in and a neuron
                in each other layer.
        """
        stand_in = self.prices.stand_in(design.stand_in, design.fit)
        profile, budget = design.profile, share * self.prices.cost.mlp
        ends = (profile.first, self.num_layers - profile.last)
        sparse = [layer for layer in range(self.num_layers) if ends[0] <= layer < ends[1]]
        budget -= sum(self.prices.layer(n) for n in range(self.num_layers) if n not in sparse)
        least = sum(self.prices.cost.per_neuron[layer] + stand_in for layer in sparse)
        if budget < least or not sparse:
            raise UserError(
                f"{share:g} of the MLPs' bytes do not pay for {self.num_layers - len(sparse)} "
                f"dense layers and {design.stand_in} {dict(design.fit)}"
            )
        spend = self._level if profile.is_level else self._by_error
        kept = self._topped_up(spend(profile, sparse, stand_in, budget), stand_in, budget)
        keeps = [1.0] * self.num_layers
        for layer, neurons in kept.items():
            size = self.prices.cost.num_neurons[layer]
            # What all but pays for the whole layer: without a stand-in that is cheaper.
            whole = neurons * self.prices.cost.per_neuron[layer] + stand_in
            if whole < self.prices.layer(layer):
                keeps[layer] = round(neurons / size, DIGITS)
        return Candidate(
            design.selector, tuple(keeps), dict(design.rule), design.stand_in, dict(design.fit)
        )

    def _level(
        self, profile: Profile, sparse: Sequence[int], stand_in: int, budget: float
    ) -> dict[int, int]:
        """The same fraction everywhere; neurons by layer."""
        left = budget - stand_in * len(sparse)
        keep = min(left / sum(self.prices.layer(layer) for layer in sparse), 1.0)
        cost = self.prices.cost
        while True:
            kept = {layer: max(int(keep * cost.num_neurons[layer]), 1) for layer in sparse}
            if sum(cost.per_neuron[layer] * neurons for layer, neurons in kept.items()) <= left:
                return kept
            keep *= 0.98  # a small layer's one neuron is more than its fraction

    def _by_error(
        self, profile: Profile, sparse: Sequence[int], stand_in: int, budget: float
    ) -> dict[int, int]:
        """The least sum of errors."""
        curves = [self._curve(profile, layer, stand_in) for layer in sparse]
        kept = {}
        for layer, spent in zip(sparse, allocate(curves, budget), strict=True):
            size, neurons = self.prices.cost.per_neuron[layer], self.prices.cost.num_neurons[layer]
            dense = spent >= self.prices.layer(layer) * (1 - 1e-9)
            kept[layer] = neurons if dense else max(int((spent - stand_in) / size + 1e-9), 1)
        return kept

    def _topped_up(self, kept: dict[int, int], stand_in: int, budget: float) -> dict[int, int]:
        """With the neurons that rounding down has left over, one a layer at most."""
        per_neuron = self.prices.cost.per_neuron
        left = budget - sum(
            min(per_neuron[layer] * neurons + stand_in, self.prices.layer(layer))
            for layer, neurons in kept.items()
        )
        for layer in kept:
            more = per_neuron[layer] * (kept[layer] + 1) + stand_in
            if per_neuron[layer] <= left and more < self.prices.layer(layer):
                kept[layer] += 1
                left -= per_neuron[layer]
        return kept

    def _curve(self, profile: Profile, layer: int, stand_in: int) -> Curve:
        """What the profile takes the layer to lose at each number of bytes."""
        whole, neuron = self.prices.layer(layer), self.prices.cost.per_neuron[layer]
        size = self.prices.cost.num_neurons[layer]
        weight = exp(profile.weight(layer, self.num_layers))
        points = {float(neuron + stand_in): self._error(profile.spread, layer, 1 / size)}
        for keep in self.errors.keeps:
            bytes_ = keep * whole + stand_in
            if neuron + stand_in < bytes_ < whole:
                points[bytes_] = self._error(profile.spread, layer, keep)
        points[float(whole)] = 0.0
        costs = tuple(sorted(points))
        return Curve(costs, tuple(weight * points[cost] for cost in costs)).smooth(FINENESS)

    def _error(self, spread: float, layer: int, keep: float) -> float:
        neutral = (1 - keep) ** 2
        least, row = self.errors.keeps[0], tuple(self.errors.errors[layer].tolist())
        measured = Curve(self.errors.keeps, row).at(keep)
        if keep < least < 1:  # it goes on rising below what was measured
            measured *= neutral / (1 - least) ** 2
        # A layer without a measurable error is not free: it is worth little.
        return float(max(measured, 1e-6) ** spread * neutral ** (1 - spread))
