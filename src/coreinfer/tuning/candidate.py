"""One point of the search: settings as plain values, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from coreinfer.evaluation.continuations import Setting
from coreinfer.runtime.stores import Stores
from coreinfer.selectors import SELECTORS, Selector
from coreinfer.standins import STAND_INS


@dataclass(frozen=True)
class Candidate:
    """A way to decode.

    Attributes:
        selector: name of the rule.
        keeps: the fraction of each layer's neurons that is kept.
        rule: the rule's other options, such as {"alpha": 0.3}.
        stand_in: name of the stand-in, "none" for plain dropping.
        fit: its options, such as {"rank": 32}.
        actives: the fraction of each layer's core neurons that a token computes whole; empty where
            that is all of them in every layer.
    """

    selector: str
    keeps: tuple[float, ...]
    rule: Mapping[str, Any] = field(default_factory=dict)
    stand_in: str = "none"
    fit: Mapping[str, Any] = field(default_factory=dict)
    actives: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """The same text for the same settings, from which they can be read back."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of_key(cls, key: str) -> Candidate:
        parts = json.loads(key)
        parts |= {name: tuple(parts[name]) for name in ("keeps", "actives")}
        return cls(**parts)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Those that keep all neurons and skip none."""
        return tuple(
            layer for layer, keep in enumerate(self.keeps) if keep == self.active(layer) == 1.0
        )

    @property
    def keeps_all(self) -> bool:
        """Whether no layer leaves a neuron out."""
        return min(self.keeps) == 1.0

    @property
    def effective(self) -> Candidate:
        """Without what has no effect: where no layer leaves a neuron out, nothing is ranked, and
        nothing stands in."""
        if not self.keeps_all:
            return self
        return Candidate("impact", self.keeps, actives=self.actives)

    @property
    def name(self) -> str:
        """The rule and the stand-in in a few words."""
        one = self.effective
        words = [one.selector, *(f"{name} {value:g}" for name, value in one.rule.items())]
        skipping = [active for active in self.actives if active < 1]
        if skipping:
            least, most = f"{min(skipping):g}", f"{max(skipping):g}"
            words.append(f"active {least}" if least == most else f"active {least} to {most}")
        words += [one.stand_in, *(f"{name} {value:g}" for name, value in one.fit.items())]
        return " ".join(word.replace("_", " ") for word in words)

    def widened(self, by: float, num_neurons: Sequence[int]) -> Candidate:
        """With so much more kept in each layer that does not keep all, but never all of it."""
        sizes = zip(self.keeps, num_neurons, strict=True)
        keeps = tuple(k if k == 1.0 else max(k, min(k + by, 1 - 1 / n)) for k, n in sizes)
        return replace(self, keeps=keeps)

    def active(self, layer: int) -> float:
        """The fraction of a layer's core neurons that a token computes whole."""
        return self.actives[layer] if self.actives else 1.0

    def more_active(self, by: float, most: float) -> Candidate:
        """With so much more active in each layer where neurons are skipped, but no more than
        `most`."""
        actives = tuple(a if a == 1.0 else max(a, min(a + by, most)) for a in self.actives)
        return replace(self, actives=actives)

    def setting(self, stores: Stores) -> Setting:
        """What it is for `measure`.

        Raises:
            UserError: if a value is out of range.
        """
        rule = SELECTORS[self.selector]
        selector = rule(**self._kept(rule), **self.rule, **stores.taken_by(rule))
        if self.stand_in == "none":
            return Setting(selector)
        made = STAND_INS[self.stand_in]
        return Setting(selector, made(**self.fit, **stores.taken_by(made)))

    def options(self, stores: Stores) -> dict[str, Any]:
        """The same as options of the command line, by their long names: what a TOML file holds.

        Layers of one budget are written together, as in {"3-5": 0.6}; what has no effect is left
        out.
        """
        one = self.effective
        rule = SELECTORS[one.selector]
        needed = set(stores.taken_by(rule))
        if one.stand_in != "none":
            needed |= set(stores.taken_by(STAND_INS[one.stand_in]))
        kept = self._kept(rule)
        by_layer = {name: kept.pop(name) for name in ("budgets", "active_budgets") if name in kept}
        made: dict[str, Any] = {"selector": one.selector, **one.rule, **kept}
        made |= {"stand_in": one.stand_in, **one.fit}
        made |= {name: stores.paths[name] for name in sorted(needed)}
        made["dense_layers"] = list(self.dense_layers)
        made |= {name: _in_runs(budgets) for name, budgets in by_layer.items()}
        return {name.replace("_", "-"): value for name, value in made.items()}

    def _kept(self, rule: type[Selector]) -> dict[str, Any]:
        """The options that say how much is kept, and how much of that is active."""
        dense = self.dense_layers
        keeps = {layer: keep for layer, keep in enumerate(self.keeps) if layer not in dense}
        made = {"dense_layers": dense, **_budgets(rule.keep_name, "budgets", keeps)}
        if self.actives:
            actives = {layer: self.active(layer) for layer in keeps}
            made |= _budgets("active", "active_budgets", actives)
        return made


def _budgets(of_all: str, by_layer: str, budgets: Mapping[int, float]) -> dict[str, Any]:
    """One option for all layers where they are alike, else one that names them."""
    values = list(dict.fromkeys(budgets.values()))
    if len(values) == 1:
        return {of_all: values[0]}
    return {by_layer: budgets} if budgets else {}


def _in_runs(budgets: Mapping[int, float]) -> dict[str, float]:
    """Consecutive layers of the same budget as one key; {3: 0.6, 4: 0.6} -> {"3-4": 0.6}."""
    runs = {}
    for keep, run in groupby(enumerate(budgets.items()), lambda at: (at[1][0] - at[0], at[1][1])):
        layers = [layer for _, (layer, _) in run]
        name = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        runs[name] = keep[1]
    return runs
