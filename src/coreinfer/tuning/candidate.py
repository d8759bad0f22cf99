"""One point of the search: settings as plain values, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coreinfer.evaluation.continuations import Setting
from coreinfer.selectors import SELECTORS, Selector
from coreinfer.semantics.store import ClusterStore
from coreinfer.standins import STAND_INS, StandIn


@dataclass(frozen=True)
class Stores:
    """Where the stores lie that rules and stand-ins may need, as paths, and opened.

    Attributes:
        paths: option name ("clusters", "calibration") -> folder, as it was given.
        opened: the same names -> the store.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    opened: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: Mapping[str, str]) -> Stores:
        """Raises UserError if one is missing or damaged."""
        return cls(dict(paths), {name: _OPEN[name](path) for name, path in paths.items()})


_OPEN: Mapping[str, Any] = {"clusters": lambda path: ClusterStore.load(Path(path))}


def fields_of(made: type[Selector] | type[StandIn]) -> frozenset[str]:
    """The options that a rule or a stand-in takes."""
    return frozenset(made.__dataclass_fields__)


@dataclass(frozen=True)
class Candidate:
    """A way to decode.

    Attributes:
        selector: name of the rule.
        rule: its options but for how much is kept, such as {"alpha": 0.3}.
        stand_in: name of the stand-in, "none" for plain dropping.
        fit: its options, such as {"rank": 32}.
        keeps: the fraction of each layer's neurons that is kept; 1.0 is a dense layer.
    """

    selector: str
    keeps: tuple[float, ...]
    rule: Mapping[str, Any] = field(default_factory=dict)
    stand_in: str = "none"
    fit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same text for the same settings."""
        parts = [self.selector, dict(self.rule), self.stand_in, dict(self.fit), list(self.keeps)]
        return json.dumps(parts, sort_keys=True)

    @classmethod
    def of_key(cls, key: str) -> Candidate:
        selector, rule, stand_in, fit, keeps = json.loads(key)
        return cls(selector, tuple(keeps), rule, stand_in, fit)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, keep in enumerate(self.keeps) if keep == 1.0)

    def setting(self, stores: Stores) -> Setting:
        """What it is for `measure`.

        Raises:
            UserError: if a value is out of range.
        """
        rule = SELECTORS[self.selector]
        needed = {name: s for name, s in stores.opened.items() if name in fields_of(rule)}
        selector = rule(**self._kept(rule), **self.rule, **needed)
        if self.stand_in == "none":
            return Setting(selector)
        made = STAND_INS[self.stand_in]
        needed = {name: s for name, s in stores.opened.items() if name in fields_of(made)}
        return Setting(selector, made(**self.fit, **needed))

    def options(self, stores: Stores) -> dict[str, Any]:
        """The same as options of the command line, by their long names."""
        rule = SELECTORS[self.selector]
        kept = self._kept(rule)
        # What decoding needs of the stores, and nothing else.
        takes = fields_of(rule)
        if self.stand_in != "none":
            takes |= fields_of(STAND_INS[self.stand_in])
        made: dict[str, Any] = {"selector": self.selector, **self.rule}
        made |= {name: value for name, value in kept.items() if value not in ((), {})}
        made |= {"stand_in": self.stand_in, **self.fit}
        made |= {name: path for name, path in stores.paths.items() if name in takes}
        return {name.replace("_", "-"): value for name, value in made.items()}

    def _kept(self, rule: type[Selector]) -> dict[str, Any]:
        """The options that say how much is kept."""
        sparse = {layer: keep for layer, keep in enumerate(self.keeps) if keep < 1.0}
        made: dict[str, Any] = {"dense_layers": self.dense_layers}
        if len(set(sparse.values())) == 1:
            return {rule.keep_name: next(iter(sparse.values())), **made}
        return {**made, "budgets": sparse}
