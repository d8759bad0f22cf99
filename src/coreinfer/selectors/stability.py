"""Stability-guided selection: the prompt's own core neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import require_ratio
from coreinfer.selectors.base import Selector
from coreinfer.selectors.rules import by_counts


@dataclass(frozen=True, kw_only=True)
class Stability(Selector):
    """The paper's rule on the prompt itself (arXiv 2410.18311): for long, coherent prompts.

    f(n) counts the tokens in whose C_alpha(t) neuron n is; the round(beta * D) neurons with the
    largest f are kept, ties to the larger sum of positive activations, then the smaller index.

    Args:
        alpha: fraction of each token's positive activations that count, in (0, 1].
    """

    alpha: float = 0.4

    name: ClassVar[str] = "stability"
    needs_counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ratio("alpha", self.alpha)

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return by_counts(statistics)
