"""The stores that rules and stand-ins take, opened from their paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coreinfer.calibration.store import CalibrationStore
from coreinfer.selectors import Selector
from coreinfer.semantics.store import ClusterStore
from coreinfer.standins import StandIn

_OPEN: Mapping[str, Any] = {"clusters": ClusterStore.load, "calibration": CalibrationStore.load}


@dataclass(frozen=True)
class Stores:
    """The stores that rules and stand-ins may need.

    Attributes:
        paths: name of the option ("clusters", "calibration") -> folder, as it was given.
        opened: the same names -> the store.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    opened: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: Mapping[str, str]) -> Stores:
        """Raises UserError if one is missing or damaged."""
        return cls(dict(paths), {name: _OPEN[name](Path(path)) for name, path in paths.items()})

    def serve(self, made: type[Selector] | type[StandIn]) -> bool:
        """Whether all stores that a rule or a stand-in takes are here."""
        return self.asked_by(made) <= self.opened.keys()

    def taken_by(self, made: type[Selector] | type[StandIn]) -> dict[str, Any]:
        return {name: self.opened[name] for name in self.asked_by(made)}

    @staticmethod
    def asked_by(made: type[Selector] | type[StandIn]) -> set[str]:
        """The names of the stores that a rule or a stand-in has a field for."""
        return set(made.__dataclass_fields__) & set(_OPEN)
