"""The settings that a row decodes with, as plain values that another process can be handed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from coreinfer.errors import UserError
from coreinfer.runtime.stores import Stores
from coreinfer.selectors import SELECTORS, Dense, Impact, Selector
from coreinfer.standins import STAND_INS, Linear, StandIn


@dataclass(frozen=True)
class Decoding:
    """A rule and a stand-in by name, with their options.

    Attributes:
        selector: name of the rule.
        rule: its options but the stores.
        stand_in: name of the stand-in; None where the other neurons are dropped.
        fit: its options but the stores.
        stores: path by the name of the option, of those that are taken.
    """

    selector: str
    rule: Mapping[str, Any] = field(default_factory=dict)
    stand_in: str | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    stores: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, selector: Selector, stand_in: StandIn | None, stores: Mapping[str, str]
    ) -> Decoding:
        """What these are, where their stores lie at these paths.

        Raises:
            UserError: if the path of a store that they take is not among them.
        """
        asked = Stores.asked_by(type(selector))
        asked |= set() if stand_in is None else Stores.asked_by(type(stand_in))
        if lacking := asked - stores.keys():
            name = min(lacking)
            raise UserError(f"--selector {selector.name} is timed with --{name} STORE alone")
        return cls(
            selector.name,
            _plain(selector),
            None if stand_in is None else stand_in.name,
            {} if stand_in is None else _plain(stand_in),
            {name: stores[name] for name in sorted(asked)},
        )

    def made(self) -> tuple[Selector, StandIn | None]:
        """The rule and the stand-in.

        Raises:
            UserError: if a store is missing or damaged.
        """
        stores, rule = Stores.open(self.stores), SELECTORS[self.selector]
        selector = rule(**_restored(self.rule), **stores.taken_by(rule))
        if self.stand_in is None:
            return selector, None
        made = STAND_INS[self.stand_in]
        return selector, made(**self.fit, **stores.taken_by(made))


def by_keep(keep: float, active: float) -> tuple[Selector, StandIn | None]:
    """The default rule and stand-in at one keep for all layers; dense where all is computed."""
    stand_in = None if keep == 1 else Linear()
    if keep == active == 1:
        return Dense(), stand_in
    return Impact(beta=keep, active=active), stand_in


def _plain(made: Selector | StandIn) -> dict[str, Any]:
    """The fields that are no stores."""
    stores = Stores.asked_by(type(made))
    return {one.name: getattr(made, one.name) for one in fields(made) if one.name not in stores}


def _restored(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were before JSON made the layers of budgets texts, and tuples lists."""
    made = dict(rule)
    for name, value in rule.items():
        if isinstance(value, Mapping):
            made[name] = {int(layer): share for layer, share in value.items()}
        elif isinstance(value, list):
            made[name] = tuple(value)
    return made
