"""How neurons are ranked, given statistics: shared by the rules that differ in whose they use."""

from __future__ import annotations

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics


def by_counts(statistics: LayerStatistics) -> tuple[Tensor, ...]:
    """The paper's rule: largest f(n), ties to the larger sum of positive activations."""
    return statistics.counts, statistics.positive_sum


def by_impact(statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
    """|h_n|_2 over the tokens times |W_down[:, n]|_2: the size of what neuron n adds."""
    return (statistics.square_sum.sqrt() * column_norms,)
