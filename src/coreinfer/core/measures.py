"""What core sets are measured by: overlap, stability, KL, density, bytes read per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import kl_div

from coreinfer.core.coreset import CoreSet


def jaccard(a: Tensor, b: Tensor) -> float:
    """|a & b| / |a | b| of two index sets without duplicates; two empty sets overlap fully."""
    first, second = set(a.tolist()), set(b.tolist())
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def overlap(a: Mapping[int, Tensor], b: Mapping[int, Tensor]) -> dict[int, float]:
    """Jaccard overlap of two core sets, layer by layer, where both have one."""
    return {layer: jaccard(a[layer], b[layer]) for layer in sorted(a.keys() & b.keys())}


def mean_overlap(a: Mapping[int, Tensor], b: Mapping[int, Tensor]) -> float:
    """Mean over the layers of `overlap`; 1.0 where no layer is sparse in both."""
    values = overlap(a, b).values()
    return sum(values) / len(values) if values else 1.0


def stability_curve(sets: Sequence[CoreSet]) -> list[float]:
    """Mean overlap of each set with the last one.

    With the sets after 1, 2, ..., n tokens of a prompt this is the stability of its core
    neurons: how soon the set of the whole prompt is known.
    """
    return [mean_overlap(one.layers, sets[-1].layers) for one in sets]


def kl_by_token(dense: Tensor, sparse: Tensor) -> Tensor:
    """KL(dense || sparse), nats, of log-probabilities [..., V]: [...]."""
    return kl_div(sparse, dense, reduction="none", log_target=True).sum(dim=-1)


THRESHOLD_BYTES = 4  # a neuron, float32: what its activation is compared with


@dataclass(frozen=True)
class ReadCost:
    """Bytes of weights that decoding one token reads.

    Attributes:
        shared: what is read whatever the core set: attention, norms, output head, one row of
            each embedding table, the MLPs' output biases.
        per_neuron: for each layer, the bytes of one neuron's weights and biases.
        num_neurons: for each layer, D.
        behind_gate: for each layer, those of a neuron's bytes that a token does not read that skips
            it (`coreinfer.core.skipping`).
    """

    shared: int
    per_neuron: tuple[int, ...]
    num_neurons: tuple[int, ...]
    behind_gate: tuple[int, ...] = ()

    @property
    def mlp(self) -> int:
        """Bytes of all neurons."""
        return sum(a * b for a, b in zip(self.per_neuron, self.num_neurons, strict=True))

    @property
    def dense(self) -> int:
        return self.shared + self.mlp

    def sparse(self, core_set: CoreSet, stand_in: int = 0) -> int:
        """Bytes with the neurons of `core_set` alone, plus `stand_in` bytes of its stand-in."""
        kept = sum(size * core_set.kept(layer) for layer, size in enumerate(self.per_neuron))
        return self.shared + kept + stand_in

    def neuron(self, layer: int, active: float = 1.0) -> float:
        """Bytes of a core neuron of a layer, where a token computes `active` of them whole."""
        if active == 1:
            return self.per_neuron[layer]
        return self.per_neuron[layer] + THRESHOLD_BYTES - (1 - active) * self.behind_gate[layer]

    def skipped(self, core_set: CoreSet, active: Callable[[int], float]) -> float:
        """Bytes that a token is spared which computes `active(layer)` of the core neurons whole."""
        return sum(
            (self.per_neuron[layer] - self.neuron(layer, active(layer))) * len(kept)
            for layer, kept in core_set.layers.items()
        )

    def ceiling(self, keep: float) -> float:
        """The speed-up that reading `keep` of every MLP allows at most (bytes dense / sparse)."""
        return self.dense / (self.shared + keep * self.mlp)
