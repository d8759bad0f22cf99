"""Auto: the prompt's own core neurons, a corpus', or a blend of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from coreinfer.core.measures import jaccard
from coreinfer.core.selection import neuron_budget, top_neurons
from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import UserError, require_ratio, require_whole
from coreinfer.selectors.base import LayerSource, Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.selectors.rules import by_counts
from coreinfer.semantics.store import ClusterStore

MODES = ("blend", "choice")


@dataclass(frozen=True, kw_only=True)
class Auto(Selector):
    """Measures how stable the prompt's own core neurons are; if they are not, leans on a corpus.

    The stability s is the mean Jaccard overlap, over the sparse layers, of the sets chosen from
    the first and from the second half of the prompt's S tokens. The prior is the nearest cluster,
    or the whole corpus where no cluster is near (cosine to the nearest centroid below
    `min_similarity`); its counts were summed over S_c tokens.

    - `choice`: the prompt's own counts if S >= `prior_tokens` and s >= `min_stability`, else the
      prior's.
    - `blend`: counts of the prompt + lambda * counts of the prior, lambda =
      (1 - s) * prior_tokens / S_c. The prior then weighs as much as `prior_tokens` tokens of a
      wholly unstable prompt: a short prompt is guided by similarity, a long one by stability.

    Args:
        clusters: a cluster store made for this model; its alpha is used for the prompt too.
        mode: "blend" or "choice".
        prior_tokens: how many tokens of prompt outweigh the prior, at least 1.
        min_stability: s from which `choice` trusts the prompt, 0 to 1.
        min_similarity: cosine below which no cluster counts as near, -1 to 1; None for that of the
            store's encoder, for each has its own scale.
    """

    clusters: ClusterStore
    mode: str = "blend"
    prior_tokens: int = 64
    min_stability: float = 0.4
    min_similarity: float | None = None

    name: ClassVar[str] = "auto"
    needs_counts: ClassVar[bool] = True
    needs_halves: ClassVar[bool] = True
    needs_input_sums: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise UserError(f"auto's mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        require_whole("prior_tokens", self.prior_tokens, 1)
        require_ratio("min_stability", self.min_stability, zero_ok=True)
        if self.min_similarity is not None:
            _require_cosine("min_similarity", self.min_similarity)

    @property
    def counting_alpha(self) -> float | None:
        return self.clusters.alpha

    @property
    def nearness(self) -> float:
        """The cosine from which a cluster counts as near."""
        own = self.min_similarity
        return self.clusters.encoder.min_similarity if own is None else own

    def check(self, num_neurons: Sequence[int], fingerprint: str, model: str) -> None:
        self.clusters.require_model(fingerprint, model)
        super().check(num_neurons, fingerprint, model)

    def by_layer(self, num_neurons: Sequence[int]) -> LayerSource | None:
        return None  # it weighs how stable all layers are

    def source(self, evidence: Evidence) -> tuple[Sequence[LayerStatistics], dict[str, Any]]:
        nearest = self.clusters.nearest(evidence)
        stability = self.stability(evidence)
        notes = {**nearest.describe(), "stability": stability}
        if nearest.similarity >= self.nearness:
            prior, name = self.clusters.statistics(nearest.cluster), "cluster"
        else:
            prior, name = self.clusters.corpus_statistics(), "corpus"
            notes["why"] = "no cluster is near"
        if self.mode == "choice":
            trusted = evidence.tokens >= self.prior_tokens and stability >= self.min_stability
            chosen = evidence.layers if trusted else prior
            return chosen, {**notes, "guided_by": "prompt" if trusted else name}
        weight = (1.0 - stability) * self.prior_tokens / max(prior[0].tokens, 1)
        blended = [
            own + other.scaled(weight) for own, other in zip(evidence.layers, prior, strict=True)
        ]
        return blended, {**notes, "guided_by": "blend", "prior": name, "lambda": weight}

    def stability(self, evidence: Evidence) -> float:
        """Mean overlap of the sets of the prompt's two halves; 0 where a half has no token."""
        if evidence.halves is None or not all(half[0].tokens for half in evidence.halves):
            return 0.0
        overlaps = []
        for layer, (first, second) in enumerate(zip(*evidence.halves, strict=True)):
            if layer not in self.dense_layers:
                keep = self.budgets.get(layer, self.default_keep)
                budget = neuron_budget(keep, first.num_neurons)
                sets = [top_neurons(by_counts(half), budget) for half in (first, second)]
                overlaps.append(jaccard(*sets))
        return sum(overlaps) / len(overlaps) if overlaps else 1.0

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return by_counts(statistics)


def _require_cosine(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and -1 <= value <= 1):  # type: ignore[operator]
        raise UserError(f"{name} must be a number from -1 to 1, got {value!r}")
