"""No selection: every layer keeps all its neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.selectors.base import Selection, Selector
from coreinfer.selectors.evidence import Evidence


@dataclass(frozen=True, kw_only=True)
class Dense(Selector):
    """Dense decoding, for comparison: no layer is sparse, whatever the other settings say."""

    beta: float = 1.0

    name: ClassVar[str] = "dense"

    @classmethod
    def beside(cls, selector: Selector) -> Dense:
        """Dense decoding that can follow a prefill recorded for `selector`."""
        return cls(count_bos=selector.count_bos)

    def select(self, evidence: Evidence) -> Selection:
        return Selection({})

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return (statistics.square_sum,)
