"""Impact: the sign-free L2 statistic, weighted by the down projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.selectors.base import Selector
from coreinfer.selectors.rules import by_impact


@dataclass(frozen=True, kw_only=True)
class Impact(Selector):
    """Scores neuron n by |h_n|_2 over the prompt times |W_down[:, n]|_2.

    That product is the norm of all that the neuron added to the residual stream, so negative
    activations, half of the large ones in a SwiGLU model, count as they should. It is what WINA's
    weighting (arXiv 2505.19427) gives on a prompt's aggregate.
    """

    name: ClassVar[str] = "impact"
    needs_column_norms: ClassVar[bool] = True

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return by_impact(statistics, column_norms)
