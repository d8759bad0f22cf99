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
from coreinfer.tuning.prices import MOST_ACTIVE, Prices

DIGITS = 6  # of a keep: enough for round(keep * D) to be the number of neurons that was meant
MOST_CLOSED = 0.9  # of a layer's core neurons that a token may skip
LEAST_CLOSED = 1 - MOST_ACTIVE  # below which it skips none
ACTIVE_DIGITS = 3
MOST_MORE = 5.0  # a log-weight: then next to nothing is skipped
HALVINGS = 24  # to find one that spends the bytes
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
        slope, bend: log-weight along the depth, of what is dropped and of what is skipped:
            slope * x + bend * (x^2 - 1/3), x from -1 to 1.
        weights: further log-weights of what is dropped, a layer each; empty for none.
        active_weights: further log-weights of what is skipped, a layer each; empty for none. The
            1 - active of a layer is what the rule says, divided by exp(its weight).
    """

    first: int = 0
    last: int = 0
    spread: float = 0.0
    slope: float = 0.0
    bend: float = 0.0
    weights: tuple[float, ...] = ()
    active_weights: tuple[float, ...] = ()

    @property
    def is_level(self) -> bool:
        """Whether all layers that are not dense keep the same fraction, and skip the same."""
        own = any(self.weights) or any(self.active_weights)
        return not (self.spread or self.slope or self.bend or own)

    def weight(self, layer: int, layers: int) -> float:
        """Of what a layer drops."""
        return self._by_depth(layer, layers) + (self.weights[layer] if self.weights else 0.0)

    def active(self, layer: int, layers: int, of_all: float, more: float = 0.0) -> float:
        """The fraction of the core neurons of a layer that are active, where it is `of_all` in a
        layer of weight 0; `more` is added to the weights of all."""
        own = self.active_weights[layer] if self.active_weights else 0.0
        weight = self._by_depth(layer, layers) + own + more
        if weight == 0:
            return of_all
        closed = min((1 - of_all) * exp(-weight), MOST_CLOSED)
        return 1.0 if closed < LEAST_CLOSED else round(1 - closed, ACTIVE_DIGITS)

    def _by_depth(self, layer: int, layers: int) -> float:
        x = 2 * layer / (layers - 1) - 1 if layers > 1 else 0.0
        return self.slope * x + self.bend * (x * x - 1 / 3)


@dataclass(frozen=True)
class Design:
    """All of a candidate but how many bytes it may read; the names are those of `Candidate`, but
    that the rule says how much is active, the same in all layers unless the profile differs."""

    selector: str
    rule: Mapping[str, Any] = field(default_factory=dict)
    stand_in: str = "none"
    fit: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile = Profile()


@dataclass(frozen=True)
class Cost:
    """What a layer of a design reads, in bytes a token.

    Attributes:
        neuron: for each of its core neurons.
        stand_in: unless it keeps all.
        neurons: D.
        active: fraction of the core neurons that a token computes whole.
    """

    neuron: int
    stand_in: int
    neurons: int
    active: float

    @property
    def most(self) -> int:
        """With all neurons."""
        return self.neuron * self.neurons

    def of(self, kept: int) -> int:
        """With so many core neurons."""
        return self.neuron * kept + (self.stand_in if kept < self.neurons else 0)

    def kept(self, wanted: int) -> int:
        """So many core neurons, at least one; all of them where that reads no more."""
        if self.neuron * wanted + self.stand_in >= self.most:
            return self.neurons
        return min(max(wanted, 1), self.neurons)


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

        Where these pay for all neurons, some of them skipped, fewer are skipped.

        Raises:
            UserError: if so few bytes do not pay for its dense layers, its stand-in and a neuron
                in each other layer.
        """
        profile = design.profile
        sparse = range(profile.first, self.num_layers - profile.last)
        dense = [layer for layer in range(self.num_layers) if layer not in sparse]
        budget = share * self.prices.cost.mlp - sum(map(self.prices.layer, dense))
        costs = self._costs(design, sparse)
        if budget < sum(cost.of(1) for cost in costs.values()) or not sparse:
            raise UserError(
                f"{share:g} of the MLPs' bytes do not pay for {len(dense)} dense layers and "
                f"{design.stand_in} {dict(design.fit)}"
            )
        if budget >= sum(cost.most for cost in costs.values()):
            costs = self._all_kept(design, sparse, budget)
            kept = {layer: cost.neurons for layer, cost in costs.items()}
        else:
            spend = self._level if profile.is_level else self._by_error
            kept = _topped_up(spend(profile, costs, budget), costs, budget)
        keeps, actives = [1.0] * self.num_layers, [1.0] * self.num_layers
        for layer, cost in costs.items():
            keeps[layer] = round(kept[layer] / cost.neurons, DIGITS)
            actives[layer] = cost.active
        return Candidate(
            design.selector,
            tuple(keeps),
            {name: value for name, value in design.rule.items() if name != "active"},
            design.stand_in,
            dict(design.fit),
            tuple(actives) if min(actives) < 1 else (),
        )

    def _costs(self, design: Design, sparse: Sequence[int], more: float = 0.0) -> dict[int, Cost]:
        """Of the layers between the dense ends.

        Args:
            more: log-weight by which less is skipped than the design says.
        """
        of_all = float(design.rule.get("active", 1.0))
        stand_in = self.prices.stand_in(design.stand_in, design.fit)
        made = {}
        for layer in sparse:
            neurons = self.prices.cost.num_neurons[layer]
            active = design.profile.active(layer, self.num_layers, of_all, more)
            if self.prices.neuron(layer, active) >= self.prices.neuron(layer):
                active = 1.0  # skipping so few spares less than their thresholds take
            made[layer] = Cost(self.prices.neuron(layer, active), stand_in, neurons, active)
        return made

    def _all_kept(self, design: Design, sparse: Sequence[int], budget: float) -> dict[int, Cost]:
        """With as little skipped as the bytes allow where all neurons are kept."""
        low, high = 0.0, MOST_MORE
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            costs = self._costs(design, sparse, middle)
            if sum(cost.most for cost in costs.values()) <= budget:
                low = middle
            else:
                high = middle
        return self._costs(design, sparse, low)

    def _level(self, profile: Profile, costs: Mapping[int, Cost], budget: float) -> dict[int, int]:
        """The same fraction everywhere; neurons by layer."""
        left = budget - sum(cost.stand_in for cost in costs.values())
        keep = min(left / sum(cost.most for cost in costs.values()), 1.0)
        while True:
            kept = {layer: max(int(keep * cost.neurons), 1) for layer, cost in costs.items()}
            if sum(costs[layer].neuron * neurons for layer, neurons in kept.items()) <= left:
                return {layer: costs[layer].kept(neurons) for layer, neurons in kept.items()}
            keep *= 0.98  # a small layer's one neuron is more than its fraction

    def _by_error(
        self, profile: Profile, costs: Mapping[int, Cost], budget: float
    ) -> dict[int, int]:
        """The least sum of errors."""
        curves = [self._curve(profile, layer, cost) for layer, cost in costs.items()]
        kept = {}
        for (layer, cost), spent in zip(costs.items(), allocate(curves, budget), strict=True):
            whole = spent >= cost.most * (1 - 1e-9)
            neurons = int((spent - cost.stand_in) / cost.neuron + 1e-9)
            kept[layer] = cost.neurons if whole else cost.kept(neurons)
        return kept

    def _curve(self, profile: Profile, layer: int, cost: Cost) -> Curve:
        """What the profile takes the layer to lose at each number of bytes."""
        weight = exp(profile.weight(layer, self.num_layers))
        points = {float(cost.of(1)): self._error(profile.spread, layer, 1 / cost.neurons)}
        for keep in self.errors.keeps:
            bytes_ = keep * cost.most + cost.stand_in
            if keep < 1 and cost.of(1) < bytes_ < cost.most:
                points[bytes_] = self._error(profile.spread, layer, keep)
        points[float(cost.most)] = 0.0
        costs = tuple(sorted(points))
        return Curve(costs, tuple(weight * points[at] for at in costs)).smooth(FINENESS)

    def _error(self, spread: float, layer: int, keep: float) -> float:
        neutral = (1 - keep) ** 2
        least, row = self.errors.keeps[0], tuple(self.errors.errors[layer].tolist())
        measured = Curve(self.errors.keeps, row).at(keep)
        if keep < least < 1:  # it goes on rising below what was measured
            measured *= neutral / (1 - least) ** 2
        # A layer without a measurable error is not free: it is worth little.
        return float(max(measured, 1e-6) ** spread * neutral ** (1 - spread))


def _topped_up(kept: dict[int, int], costs: Mapping[int, Cost], budget: float) -> dict[int, int]:
    """With the neurons that rounding down has left over, one a layer at most."""
    left = budget - sum(costs[layer].of(neurons) for layer, neurons in kept.items())
    for layer, neurons in kept.items():
        cost = costs[layer]
        if cost.kept(neurons + 1) == neurons + 1 < cost.neurons and cost.neuron <= left:
            kept[layer] = neurons + 1
            left -= cost.neuron
    return kept
