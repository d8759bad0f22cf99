"""A core set chosen earlier, from a file or another prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coreinfer.core.coreset import CoreSet
from coreinfer.core.statistics import LayerStatistics
from coreinfer.selectors.base import Selector


@dataclass(frozen=True, kw_only=True)
class Fixed(Selector):
    """Decodes with a given `CoreSet`; beta, budgets and dense layers are those of the set."""

    core_set: CoreSet

    name: ClassVar[str] = "fixed"

    def keep_where(self, sparse_layers: Iterable[int]) -> float | None:
        return None  # the set alone says what is kept

    def check(self, num_neurons: Sequence[int], fingerprint: str, model: str) -> None:
        self.core_set.require_model(fingerprint, model)
        self.check_layers(len(num_neurons))

    def choose(
        self, layer: int, statistics: LayerStatistics, column_norms: Callable[[int], Tensor]
    ) -> Tensor | None:
        return self.core_set.layers.get(layer)

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return (statistics.square_sum,)

    def describe(self) -> dict[str, Any]:
        chosen = {"name": self.name, "core_set": dict(self.core_set.selector)}
        if not self.skips:
            return chosen
        own = {str(layer): active for layer, active in self.active_budgets.items()}
        return {**chosen, "active": self.active, "active_budgets": own}
