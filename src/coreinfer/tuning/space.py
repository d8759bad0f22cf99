"""What is searched: rules, stand-ins, their options, and the profile of the budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Any, Protocol

from coreinfer.runtime.stores import Stores
from coreinfer.selectors import SELECTORS, Selector
from coreinfer.standins import STAND_INS, StandIn
from coreinfer.tuning.design import Design, Profile
from coreinfer.tuning.prices import Prices

RULES = ("stability", "similarity", "auto", "impact", "griffin", "residual")
RANKS = (4, 8, 16, 32, 64, 128, 256)
ACTIVE = (0.75, 0.6, 0.45)  # of the core neurons, at which the two best rules are tried
MAP_SHARE = 8  # a stand-in's map may read one part in so many of its layer
MOST_DENSE = 4  # layers at either end of the model, and a quarter of it at most
LEAST_SHARE, MOST_SHARE = 0.2, 0.97  # of the dense MLPs' bytes, where they are searched
START_SHARE = 0.7  # at which the search begins, where they are


class Trial(Protocol):
    """What is used of `optuna.trial.Trial`."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


@dataclass(frozen=True)
class Range:
    """Numbers to search, by their logarithm unless `log` is false; above `most` it is `most`."""

    low: float
    high: float
    log: bool = True
    most: float = inf

    def suggest(self, trial: Trial, name: str) -> float:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return min(trial.suggest_float(name, self.low, self.high, log=self.log), self.most)


# Options that are searched, by the field that a rule or a stand-in has for them.
OPTIONS: Mapping[str, Range] = MappingProxyType(
    {
        "alpha": Range(0.05, 1.0),
        "prior_tokens": Range(8, 1024),
        "active": Range(0.3, 1.2, log=False, most=1.0),  # a part of the trials skips none
        "ridge": Range(0.03, 30.0),
    }
)


@dataclass(frozen=True)
class Space:
    """All designs that may be tried.

    Attributes:
        rules, stand_ins: their names.
        ranks: of a stand-in's map.
        most_dense: layers at either end.
        share: the part of the MLPs' bytes to read; None searches that too.
        skips: whether core neurons may be skipped.
    """

    rules: tuple[str, ...]
    stand_ins: tuple[str, ...]
    ranks: tuple[int, ...]
    most_dense: int
    share: float | None = None
    skips: bool = False

    @classmethod
    def of(
        cls, prices: Prices, stores: Stores, share: float | None, *, skips: bool = False
    ) -> Space:
        """All rules and stand-ins that the stores serve, and ranks that leave room for neurons."""
        layers = range(len(prices.cost.num_neurons))
        room = min(map(prices.layer, layers)) / (MAP_SHARE * prices.direction)
        return cls(
            rules=tuple(name for name in RULES if stores.serve(SELECTORS[name])),
            stand_ins=("none", *(name for name, made in STAND_INS.items() if stores.serve(made))),
            ranks=tuple(rank for rank in RANKS if rank <= room) or (1,),
            most_dense=min(MOST_DENSE, len(layers) // 4),
            share=share,
            skips=skips,
        )

    def suggest(self, trial: Trial) -> tuple[Design, float]:
        """A design, and the share of bytes that it may read."""
        rule = trial.suggest_categorical("selector", self.rules)
        stand_in = trial.suggest_categorical("stand_in", self.stand_ins)
        made = {
            name: OPTIONS[name].suggest(trial, f"{rule}.{name}") for name in self._searched(rule)
        }
        fit: dict[str, Any] = {}
        if "rank" in _fields(stand_in):
            fit["rank"] = trial.suggest_categorical("rank", self.ranks)
            fit["ridge"] = OPTIONS["ridge"].suggest(trial, f"{stand_in}.ridge")
        profile = Profile(
            first=trial.suggest_int("first", 0, self.most_dense),
            last=trial.suggest_int("last", 0, self.most_dense),
            spread=trial.suggest_float("spread", 0.0, 1.2),
            slope=trial.suggest_float("slope", -1.0, 1.0),
            bend=trial.suggest_float("bend", -1.0, 1.0),
        )
        share = self.share
        if share is None:
            share = trial.suggest_float("share", LEAST_SHARE, MOST_SHARE)
            share = round(share, 4)
        return Design(rule, _rounded(made), stand_in, _rounded(fit), profile), share

    def level(self) -> Iterator[dict[str, Any]]:
        """Parameters of every rule with every stand-in, as they are by default, one keep for all
        layers: the single global settings that a search begins with, and is measured by. Before
        them, where neurons may be skipped, of one that skips them."""
        if self.skips:
            rule = self.rules[-1]
            yield {**self._parameters(rule, "none", Profile()), f"{rule}.active": ACTIVE[-1]}
        for rule in self.rules:
            for stand_in in self.stand_ins:
                yield self._parameters(rule, stand_in, Profile())

    def around(self, rule: str, stand_in: str) -> Iterator[dict[str, Any]]:
        """Parameters of a rule and a stand-in at other ranks, with some neurons skipped, and with
        budgets as often serve."""
        level = self._parameters(rule, stand_in, Profile())
        if "rank" in level:
            at = self.ranks.index(level["rank"])
            for rank in self.ranks[max(at - 1, 0) : at] + self.ranks[at + 1 : at + 2]:
                yield {**level, "rank": rank}
        for active in ACTIVE if self.skips else ():
            yield {**level, f"{rule}.active": active}
        most = self.most_dense
        for first, last, spread in ((most, most // 2, 0.0), (0, 0, 0.5), (most // 2, 1, 0.5)):
            profile = Profile(first=min(first, most), last=min(last, most), spread=spread)
            yield self._parameters(rule, stand_in, profile)

    def _parameters(self, rule: str, stand_in: str, profile: Profile) -> dict[str, Any]:
        made: dict[str, Any] = {"selector": rule, "stand_in": stand_in}
        made |= {f"{rule}.{name}": _default(rule, name) for name in self._searched(rule)}
        if "rank" in _fields(stand_in):
            wanted = _default(stand_in, "rank")
            made["rank"] = min(self.ranks, key=lambda rank: abs(rank - wanted))
            made[f"{stand_in}.ridge"] = _default(stand_in, "ridge")
        made |= {name: getattr(profile, name) for name in ("first", "last", "spread")}
        made |= {"slope": 0.0, "bend": 0.0}
        return made if self.share is not None else {**made, "share": START_SHARE}

    def _searched(self, rule: str) -> list[str]:
        known = _fields(rule) - (frozenset() if self.skips else {"active"})
        return [name for name in OPTIONS if name in known]


def _made(name: str) -> type[Selector] | type[StandIn] | None:
    """The rule or stand-in of this name; None for plain dropping."""
    return SELECTORS.get(name) or STAND_INS.get(name)


def _fields(name: str) -> frozenset[str]:
    made = _made(name)
    return frozenset() if made is None else frozenset(made.__dataclass_fields__)


def _default(name: str, field: str) -> Any:
    made = _made(name)
    assert made is not None
    return made.__dataclass_fields__[field].default


def _rounded(options: Mapping[str, Any]) -> dict[str, Any]:
    """To three digits, which is how they are written and read back."""
    return {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in options.items()
    }
