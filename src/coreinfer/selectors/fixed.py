"""A core set chosen earlier, from a file or another prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coreinfer.core.coreset import CoreSet
from coreinfer.core.statistics import LayerStatistics
from coreinfer.selectors.base import Selection, Selector
from coreinfer.selectors.evidence import Evidence


@dataclass(frozen=True, kw_only=True)
class Fixed(Selector):
    """Decodes with a given `CoreSet`; beta, budgets and dense layers are those of the set."""

    core_set: CoreSet

    name: ClassVar[str] = "fixed"

    def check(self, num_neurons: Sequence[int], fingerprint: str, model: str) -> None:
        self.core_set.require_model(fingerprint, model)

    def select(self, evidence: Evidence) -> Selection:
        return Selection(dict(self.core_set.layers))

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return (statistics.square_sum,)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "core_set": dict(self.core_set.selector)}
