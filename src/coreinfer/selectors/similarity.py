"""Similarity-guided selection: the core neurons of the nearest cluster of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import require_ratio
from coreinfer.selectors.base import LayerSource, Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.selectors.rules import by_counts
from coreinfer.semantics.store import ClusterStore


@dataclass(frozen=True, kw_only=True)
class Similarity(Selector):
    """The paper's rule for short prompts (arXiv 2410.18311): a neighbour's core neurons.

    The prompt is embedded and assigned to the nearest cluster of the store; the round(gamma * D)
    neurons with the largest counts in that cluster are kept.

    Args:
        clusters: a cluster store made for this model.
        gamma: fraction of each sparse layer's neurons to keep, in (0, 1].
    """

    clusters: ClusterStore
    gamma: float = 0.4

    name: ClassVar[str] = "similarity"
    keep_name: ClassVar[str] = "gamma"
    needs_input_sums: ClassVar[bool] = True  # what an encoder may compare

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ratio("gamma", self.gamma)

    @property
    def counting_alpha(self) -> float | None:
        # The prompt's own counts matter only to an encoder that embeds by core neurons.
        return self.clusters.alpha if self.clusters.encoder.needs_counts else None

    def check(self, num_neurons: Sequence[int], fingerprint: str, model: str) -> None:
        self.clusters.require_model(fingerprint, model)
        super().check(num_neurons, fingerprint, model)

    def by_layer(self, num_neurons: Sequence[int]) -> LayerSource | None:
        return None  # the cluster is that of the whole prompt

    def source(self, evidence: Evidence) -> tuple[Sequence[LayerStatistics], dict[str, Any]]:
        nearest = self.clusters.nearest(evidence)
        return self.clusters.statistics(nearest.cluster), nearest.describe()

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return by_counts(statistics)
