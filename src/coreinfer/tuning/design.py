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
MOST_CLOSED = 0.9  # of a layer's core neurons that a token may skip
LEAST_CLOSED = 0.02  # below which it skips none: the thresholds are read for nothing
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
        closed: log-weights of what is skipped, a layer each; empty for none. Of a layer's core
            neurons the part 1 - active that the rule says is times exp of that.
    """

    first: int = 0
    last: int = 0
    spread: float = 0.0
    slope: float = 0.0
    bend: float = 0.0
    weights: tuple[float, ...] = ()
    closed: tuple[float, ...] = ()

    @property
    def is_level(self) -> bool:
        """Whether all layers that are not dense keep the same fraction."""
        return not (self.spread or self.slope or self.bend or any(self.weights))

    def weight(self, layer: int, layers: int) -> float:
        x = 2 * layer / (layers - 1) - 1 if layers > 1 else 0.0
        own = self.weights[layer] if self.weights else 0.0
        return self.slope * x + self.bend * (x * x - 1 / 3) + own

    def active(self, layer: int, of_all: float) -> float:
        """The fraction of the core neurons of a layer that are active."""
        if not self.closed:
            return of_all
        closed = min((1 - of_all) * exp(self.closed[layer]), MOST_CLOSED)
        return 1.0 if closed < LEAST_CLOSED else round(1 - closed, 3)


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
        whole: where it is dense.
        neuron: for each of its core neurons.
        stand_in: whatever it keeps.
        neurons: D.
        active: fraction of the core neurons that a token computes whole.
    """

    whole: int
    neuron: int
    stand_in: int
    neurons: int
    active: float

    def of(self, kept: int) -> int:
        """With so many core neurons, all of them being a dense layer."""
        return self.whole if kept == self.neurons else self.neuron * kept + self.stand_in

    @property
    def most(self) -> int:
        """What a layer between the dense ends may read: where some neurons are skipped, with all
        but one of them. Between that and a dense layer there is nothing to be had for bytes."""
        return self.whole if self.active == 1 else min(self.of(self.neurons - 1), self.whole)

    def kept(self, wanted: int) -> int:
        """So many core neurons, at least one; all of them where a dense layer reads no more."""
        if self.neuron * wanted + self.stand_in >= self.whole:
            return self.neurons
        return min(max(wanted, 1), self.neurons - 1)


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
                in each other layer, or pay for more neurons than there are, some skipped.
        """
        profile, costs = design.profile, self._costs(design)
        ends = (profile.first, self.num_layers - profile.last)
        sparse = [layer for layer in range(self.num_layers) if ends[0] <= layer < ends[1]]
        budget = share * self.prices.cost.mlp
        budget -= sum(cost.whole for layer, cost in enumerate(costs) if layer not in sparse)
        if budget < sum(costs[layer].of(1) for layer in sparse) or not sparse:
            raise UserError(
                f"{share:g} of the MLPs' bytes do not pay for {self.num_layers - len(sparse)} "
                f"dense layers and {design.stand_in} {dict(design.fit)}"
            )
        spend = self._level if profile.is_level else self._by_error
        kept = _topped_up(
            spend(profile, {layer: costs[layer] for layer in sparse}, budget), costs, budget
        )
        keeps = [1.0] * self.num_layers
        for layer, neurons in kept.items():
            if neurons < costs[layer].neurons:
                keeps[layer] = round(neurons / costs[layer].neurons, DIGITS)
        rule = {name: value for name, value in design.rule.items() if name != "active"}
        actives = tuple(
            1.0 if keep == 1.0 else cost.active for keep, cost in zip(keeps, costs, strict=True)
        )
        return Candidate(
            design.selector,
            tuple(keeps),
            rule,
            design.stand_in,
            dict(design.fit),
            actives if min(actives) < 1 else (),
        )

    def _costs(self, design: Design) -> list[Cost]:
        """Of every layer."""
        of_all = float(design.rule.get("active", 1.0))
        stand_in = self.prices.stand_in(design.stand_in, design.fit)
        made = []
        for layer, neurons in enumerate(self.prices.cost.num_neurons):
            active = design.profile.active(layer, of_all)
            neuron = self.prices.neuron(layer, active)
            made.append(Cost(self.prices.layer(layer), neuron, stand_in, neurons, active))
        return made

    def _level(self, profile: Profile, costs: Mapping[int, Cost], budget: float) -> dict[int, int]:
        """The same fraction everywhere; neurons by layer."""
        left = budget - sum(cost.stand_in for cost in costs.values())
        keep = min(left / sum(cost.neuron * cost.neurons for cost in costs.values()), 1.0)
        while True:
            kept = {layer: max(int(keep * cost.neurons), 1) for layer, cost in costs.items()}
            if any(cost.active < 1 and kept[n] == cost.neurons for n, cost in costs.items()):
                raise too_many()
            if sum(costs[layer].neuron * neurons for layer, neurons in kept.items()) <= left:
                return {layer: costs[layer].kept(neurons) for layer, neurons in kept.items()}
            keep *= 0.98  # a small layer's one neuron is more than its fraction

    def _by_error(
        self, profile: Profile, costs: Mapping[int, Cost], budget: float
    ) -> dict[int, int]:
        """The least sum of errors."""
        skips = any(cost.active < 1 for cost in costs.values())
        if skips and budget > sum(cost.most for cost in costs.values()):
            raise too_many()
        curves = [self._curve(profile, layer, cost) for layer, cost in costs.items()]
        kept = {}
        for (layer, cost), spent in zip(costs.items(), allocate(curves, budget), strict=True):
            dense = spent >= cost.whole * (1 - 1e-9)
            neurons = int((spent - cost.stand_in) / cost.neuron + 1e-9)
            kept[layer] = cost.neurons if dense else cost.kept(neurons)
        return kept

    def _curve(self, profile: Profile, layer: int, cost: Cost) -> Curve:
        """What the profile takes the layer to lose at each number of bytes."""
        weight = exp(profile.weight(layer, self.num_layers))
        points = {float(cost.of(1)): self._error(profile.spread, layer, 1 / cost.neurons)}
        for keep in self.errors.keeps:
            bytes_ = keep * cost.neurons * cost.neuron + cost.stand_in
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


def too_many() -> UserError:
    """For bytes that a design with skipped neurons cannot spend."""
    return UserError("so many bytes pay for all neurons, and for more of them active")


def _topped_up(kept: dict[int, int], costs: Sequence[Cost], budget: float) -> dict[int, int]:
    """With the neurons that rounding down has left over, one a layer at most."""
    left = budget - sum(costs[layer].of(neurons) for layer, neurons in kept.items())
    for layer, neurons in kept.items():
        more = costs[layer].kept(neurons + 1)
        if more == neurons + 1 < costs[layer].neurons and costs[layer].neuron <= left:
            kept[layer] = more
            left -= costs[layer].neuron
    return kept
