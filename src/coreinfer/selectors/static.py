"""Control: one set for every prompt, from the whole corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coreinfer.calibration.store import CalibrationStore
from coreinfer.core.statistics import LayerStatistics
from coreinfer.selectors.base import LayerSource, Selector
from coreinfer.selectors.rules import by_counts
from coreinfer.semantics.store import ClusterStore


@dataclass(frozen=True, kw_only=True)
class Static(Selector):
    """The paper's rule on the counts of a whole corpus: what a prompt adds is measured by it.

    Args:
        clusters: a cluster store made for this model, whose clusters are added up, or a
            calibration store, which has the counts of its corpus too.
    """

    clusters: ClusterStore | CalibrationStore

    name: ClassVar[str] = "static"

    def check(self, num_neurons: Sequence[int], fingerprint: str, model: str) -> None:
        self.clusters.require_model(fingerprint, model)
        super().check(num_neurons, fingerprint, model)

    def by_layer(self, num_neurons: Sequence[int]) -> LayerSource | None:
        corpus = self.clusters.corpus_statistics()
        return lambda layer, _own: corpus[layer]

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return by_counts(statistics)
