"""No selection: every layer keeps all its neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.selectors.base import Selector


@dataclass(frozen=True, kw_only=True)
class Dense(Selector):
    """Dense decoding, for comparison: no layer is sparse, whatever the other settings say."""

    beta: float = 1.0

    name: ClassVar[str] = "dense"

    @classmethod
    def beside(cls, selector: Selector) -> Dense:
        """Dense decoding that can follow a prefill recorded for `selector`."""
        return cls(count_bos=selector.count_bos)

    def choose(
        self, layer: int, statistics: LayerStatistics, column_norms: Callable[[int], Tensor]
    ) -> Tensor | None:
        return None

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return (statistics.square_sum,)
