"""GRIFFIN's statistic: each token's activations, normalised, squared and summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.selectors.base import Selector


@dataclass(frozen=True, kw_only=True)
class Griffin(Selector):
    """Scores neuron n by sqrt(sum_t (h_t / |h_t|_2)_n^2) (arXiv 2404.01365)."""

    name: ClassVar[str] = "griffin"

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return (statistics.unit_square_sum.sqrt(),)
