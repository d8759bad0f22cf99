"""What decoding reads of the MLPs, known before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from coreinfer.backends.base import Backend
from coreinfer.core.measures import ReadCost
from coreinfer.evaluation.continuations import Window
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import prefill
from coreinfer.selectors import Griffin
from coreinfer.standins import Linear
from coreinfer.tuning.candidate import Candidate

# Than in the prompt, which the thresholds come from: 1 to 2 % was measured. What is planned for is
# not to be exceeded.
MORE_ACTIVE = 1.03
LEAST_SKIPPED = 1 - 1e-6  # where thresholds are read at all
MOST_ACTIVE = 1 / MORE_ACTIVE  # that is worth planning for: then all of them may be


@dataclass(frozen=True)
class Prices:
    """Bytes a token.

    Attributes:
        cost: of the neurons, and of what is read whatever is kept.
        offset: of a stand-in's constant vector, a layer.
        direction: of one more rank of its map, a layer.
    """

    cost: ReadCost
    offset: int
    direction: int

    @classmethod
    def of(cls, backend: Backend, window: Window) -> Prices:
        """Asked of the backend itself, which alone knows how it stores a map."""
        layers = len(backend.cost.num_neurons)
        budgets = {layer: 1 / size for layer, size in enumerate(backend.cost.num_neurons)}
        rule, paid = Griffin(budgets=budgets), []
        for rank in (1, 2):
            made = Linear(rank=rank)
            read = prefill(backend, [window.prompt], RecordingPlan.of(rule, made), [window.text])
            paid.append(read.session.select(rule, made)[0].stand_in_bytes // layers)
        return cls(backend.cost, 2 * paid[0] - paid[1], paid[1] - paid[0])

    def layer(self, layer: int) -> int:
        """All neurons of a layer."""
        return self.cost.per_neuron[layer] * self.cost.num_neurons[layer]

    def neuron(self, layer: int, active: float = 1.0) -> int:
        """A core neuron of a layer, of which a token computes `active` whole, or a little more."""
        if active == 1:
            return self.cost.per_neuron[layer]
        return ceil(self.cost.neuron(layer, min(active * MORE_ACTIVE, LEAST_SKIPPED)))

    def stand_in(self, name: str, fit: Mapping[str, Any]) -> int:
        """A stand-in in one layer; a map has its rank unless the prompt is shorter."""
        if name == "none":
            return 0
        return self.offset + self.direction * int(fit.get("rank", 0))

    def read(self, candidate: Candidate) -> list[int]:
        """Each layer of a candidate."""
        stand_in = self.stand_in(candidate.stand_in, candidate.fit)
        pairs = zip(self.cost.num_neurons, candidate.keeps, strict=True)
        return [
            self.neuron(layer, candidate.active(layer)) * round(keep * neurons)
            + (stand_in if keep < 1.0 else 0)
            for layer, (neurons, keep) in enumerate(pairs)
        ]
