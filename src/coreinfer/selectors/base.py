"""The selector base: budgets, dense layers, and exactly K neurons a layer.

A rule is a dataclass that says whose statistics it ranks by (`by_layer`, or `source` where a layer
alone does not tell) and how (`keys`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from coreinfer.calibration.store import CalibrationStore
from coreinfer.core.selection import neuron_budget, top_neurons
from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import UserError, require_ratio, require_whole
from coreinfer.selectors.evidence import Evidence

# (layer, the prompt's own statistics of it) -> those to rank its neurons by
LayerSource = Callable[[int, LayerStatistics], LayerStatistics]


@dataclass(frozen=True)
class Selection:
    """What a selector chose: neuron indices a sparse layer, and what it wants to be known.

    `notes` is plain JSON, for example the cluster a prompt was assigned to.
    """

    layers: dict[int, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Selector(ABC):
    """Chooses the core neurons of a prompt from the statistics of its prefill.

    Args:
        beta: fraction of each sparse layer's neurons to keep, in (0, 1].
        dense_layers: layers that keep all their neurons.
        budgets: fraction to keep for single layers, where it differs from beta.
        active: fraction of a sparse layer's core neurons that a token computes whole, in (0, 1],
            mean over tokens like the prompt's: of the others, whose activation turns out small at
            this token, the gate alone is read (`coreinfer.core.skipping`).
        active_budgets: the same for single layers, where it differs from `active`.
        count_bos: let the beginning-of-sequence token count (an attention sink; by default it
            counts only when the prompt is nothing else).

    Raises:
        UserError: if a fraction is out of range, or a layer or a flag is none.
    """

    beta: float = 0.4
    dense_layers: tuple[int, ...] = ()
    budgets: Mapping[int, float] = field(default_factory=dict)
    active: float = 1.0
    active_budgets: Mapping[int, float] = field(default_factory=dict)
    count_bos: bool = False

    name: ClassVar[str]
    keep_name: ClassVar[str] = "beta"  # the field that says how much is kept
    needs_counts: ClassVar[bool] = False
    needs_halves: ClassVar[bool] = False
    needs_input_sums: ClassVar[bool] = False
    needs_future: ClassVar[bool] = False
    needs_column_norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_ratio("beta", self.beta)
        _check_dense_layers(self.dense_layers)
        _check_budgets("budget", self.budgets)
        require_ratio("active", self.active)
        _check_budgets("active budget", self.active_budgets)
        _check_flag("count_bos", self.count_bos)

    @property
    def counting_alpha(self) -> float | None:
        """alpha of the token-wise counts this rule needs; None where it needs none."""
        return getattr(self, "alpha", None) if self.needs_counts else None

    @property
    def recorded_calibration(self) -> CalibrationStore | None:
        """The calibration whose residuals this rule ranks by; None where it needs none."""
        return None

    @property
    def default_keep(self) -> float:
        """The fraction kept in layers without a budget of their own."""
        return float(getattr(self, self.keep_name))

    def keep_where(self, sparse_layers: Iterable[int]) -> float | None:
        """The fraction kept in those of the layers that have no budget of their own; None if all
        have one."""
        layers = set(sparse_layers)
        return None if layers and layers <= self.budgets.keys() else self.default_keep

    @property
    def skips(self) -> bool:
        """Whether some layer may have core neurons that a token does not compute whole."""
        return min(self.active, *self.active_budgets.values(), 1.0) < 1

    def active_in(self, layer: int) -> float:
        """The fraction of a sparse layer's core neurons that a token computes whole."""
        return self.active_budgets.get(layer, self.active)

    def active_share(self, kept: Mapping[int, Tensor]) -> float:
        """The same of all core neurons, by layer: `active` where no layer has a budget of its
        own."""
        total = sum(len(neurons) for neurons in kept.values())
        if not self.active_budgets or not total:
            return self.active
        return sum(self.active_in(n) * len(neurons) for n, neurons in kept.items()) / total

    @abstractmethod
    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        """Scores of the neurons of a layer, [D] each, most significant first.

        Args:
            statistics: of the layer, from `source`.
            column_norms: |W_down[:, n]|_2, [D]; empty unless the rule says `needs_column_norms`,
                for they take a pass over the weights.
        """

    def by_layer(self, num_neurons: Sequence[int]) -> LayerSource | None:
        """The statistics to rank by, where those of a layer follow from that layer alone.

        Such a rule can choose while the prompt is still being read. The prompt's own unless a rule
        says otherwise; None where it takes more (`source` then says what).

        Args:
            num_neurons: D of every layer of the model.
        """
        return lambda _layer, own: own

    def source(self, evidence: Evidence) -> tuple[Sequence[LayerStatistics], dict[str, Any]]:
        """The statistics to rank by, of all layers, and notes."""
        of_layer = self.by_layer([own.num_neurons for own in evidence.layers])
        assert of_layer is not None, "the rule says neither how one layer is ranked nor all"
        return [of_layer(layer, own) for layer, own in enumerate(evidence.layers)], {}

    def check(self, num_neurons: Sequence[int], fingerprint: str, model: str) -> None:
        """Refuse what does not fit the model, before any work is done.

        Raises:
            UserError: for layers outside the model, budgets that keep nothing, or stores made for
                another model.
        """
        self.check_layers(len(num_neurons))
        for layer, size in enumerate(num_neurons):
            if layer not in self.dense_layers:
                neuron_budget(self.budgets.get(layer, self.default_keep), size)

    def check_layers(self, num_layers: int) -> None:
        """Raises UserError for a layer outside the model."""
        named: dict[str, Iterable[int]] = {
            "dense layer": self.dense_layers,
            "budget layer": self.budgets,
            "active budget layer": self.active_budgets,
        }
        for what, layers in named.items():
            for layer in layers:
                if not 0 <= layer < num_layers:
                    raise UserError(
                        f"{what} {layer} is outside the model, which has 0 to {num_layers - 1}"
                    )

    def select(self, evidence: Evidence) -> Selection:
        """The core neurons of a prompt: exactly K = round(keep * D) a sparse layer."""
        statistics, notes = self.source(evidence)
        chosen = (self.choose(i, s, evidence.column_norms) for i, s in enumerate(statistics))
        return Selection({i: kept for i, kept in enumerate(chosen) if kept is not None}, notes)

    def choose(
        self, layer: int, statistics: LayerStatistics, column_norms: Callable[[int], Tensor]
    ) -> Tensor | None:
        """The core neurons of a layer, int32 [K] ascending; None where it stays dense.

        Args:
            layer: its index.
            statistics: to rank by.
            column_norms: layer -> |W_down[:, n]|_2, [D].
        """
        if layer in self.dense_layers:
            return None
        keep = self.budgets.get(layer, self.default_keep)
        budget = neuron_budget(keep, statistics.num_neurons)
        norms = column_norms(layer) if self.needs_column_norms else torch.empty(0)
        return top_neurons(self.keys(statistics, norms), budget)

    def describe(self) -> dict[str, Any]:
        """Name and parameters as plain JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name} | {key: _plain(value) for key, value in values.items()}


def _check_dense_layers(layers: object) -> None:
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise UserError(f"dense_layers must be a tuple of layer indices, got {layers!r}")
    for layer in layers:
        require_whole("a dense layer", layer, 0)


def _check_budgets(what: str, budgets: object) -> None:
    if not isinstance(budgets, Mapping):
        raise UserError(f"{what}s must map layer indices to fractions, got {budgets!r}")
    for layer, keep in budgets.items():
        require_whole(f"a layer with {what}s", layer, 0)
        require_ratio(f"the {what} of layer {layer}", keep)


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name} must be True or False, got {value!r}")


def _plain(value: Any) -> Any:
    describe = getattr(value, "describe", None)
    if describe is not None:
        return describe()
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    return list(value) if isinstance(value, (tuple, range)) else value
