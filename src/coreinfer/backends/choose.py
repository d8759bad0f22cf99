"""From what a prefill recorded to core sets and stand-ins: the same for every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from coreinfer.backends.base import Choice
from coreinfer.core.coreset import CoreSet
from coreinfer.errors import UserError
from coreinfer.recording import PromptRecorder, RecordingPlan
from coreinfer.selectors import Selection, Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import DownProjection, StandIn, StandInTerms

Compact = TypeVar("Compact")


class ModelView(Protocol):
    """What selection needs to know of a model."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def num_neurons(self) -> tuple[int, ...]: ...

    def column_norms(self, layer: int) -> Tensor:
        """|W_down[:, n]|_2, [D]."""
        ...

    def down(self, layer: int) -> DownProjection:
        """The down projection of a layer: a stand-in is fitted on it and has its dtype."""
        ...

    def stand_in_bytes(self, terms: StandInTerms) -> int:
        """Bytes that decode reads for the stand-in of a layer."""
        ...


def check(model: ModelView, selector: Selector, stand_in: StandIn | None = None) -> None:
    """Raises UserError if the selector or the stand-in does not fit the model."""
    selector.check(model.num_neurons, model.fingerprint, model.name)
    if stand_in is not None:
        stand_in.check(model.fingerprint, model.name)


@dataclass(frozen=True)
class Chosen(Generic[Compact]):
    """The outcome for a batch: one choice a sequence, and the compact layers of all of them."""

    choices: list[Choice]
    compact: dict[int, Compact]


@dataclass(frozen=True)
class SmallLayer:
    """What is to be made of a layer, for each sequence of a batch.

    Attributes:
        layer: its index.
        kept: the core neurons, all of one length.
        terms: the stand-ins, if there are any.
        least: the least activation of each core neuron that counts, where small ones are skipped.
    """

    layer: int
    kept: list[Tensor]
    terms: list[StandInTerms] | None = None
    least: list[Tensor] | None = None


Compactor = Callable[[SmallLayer], Compact]


@dataclass(frozen=True)
class SparseLayer(Generic[Compact]):
    """One layer of a batch: made smaller, and the bytes of each sequence's stand-in."""

    compact: Compact
    stand_in_bytes: list[int]


def evidence_of(
    model: ModelView,
    recorders: Sequence[PromptRecorder],
    texts: Sequence[str] | None = None,
    futures: Sequence[PromptRecorder] | None = None,
) -> list[Evidence]:
    """What a selector sees of each recorded sequence.

    Raises:
        UserError: if a sequence has no token, or activations that are not finite.
    """
    found = []
    for row, recorder in enumerate(recorders):
        layers = recorder.statistics()
        if not layers[0].tokens:
            raise UserError("the prompt is empty: there is no token to choose core neurons from")
        found.append(
            Evidence(
                layers=layers,
                column_norms=model.column_norms,
                halves=recorder.halves(),
                future=None if futures is None else futures[row].statistics(),
                text=None if texts is None else texts[row],
            )
        )
    return found


def choose(
    model: ModelView,
    recorders: Sequence[PromptRecorder],
    evidence: Sequence[Evidence],
    selector: Selector,
    stand_in: StandIn | None,
    compact_layer: Compactor[Compact],
) -> Chosen[Compact]:
    """Select each sequence's core neurons, fit the stand-ins and make the layers smaller.

    A layer that keeps all its neurons, and skips none, stays dense: keeping 100 % is exactly dense
    decoding.

    Args:
        model: what is known of the model.
        recorders, evidence: of each sequence.
        selector, stand_in: the rule, and what takes the place of the dropped neurons.
        compact_layer: makes a layer smaller.

    Raises:
        UserError: if the selector does not fit the model.
    """
    check(model, selector, stand_in)
    asked, recorded = RecordingPlan.of(selector, stand_in), recorders[0].plan
    if not recorded.covers(asked):
        raise ValueError(f"the prefill recorded {recorded}, selection needs {asked}")
    selections = [selector.select(one) for one in evidence]
    sparse: dict[int, SparseLayer[Compact]] = {}
    for layer, size in enumerate(model.num_neurons):
        kept = [s.layers[layer] for s in selections if layer in s.layers]
        if not kept or stays_whole(layer, kept[0], size, selector):
            continue
        terms = None
        least = least_activations(layer, kept, recorders, selector)
        if stand_in is not None and kept[0].numel() < size:
            down = model.down(layer)
            thresholds: Sequence[Tensor | None] = least or [None] * len(kept)
            terms = [
                stand_in.fit(
                    layer,
                    recorder.sample(layer),
                    down,
                    others(index, size),
                    skipped=skipped_part(stand_in, layer, recorder, down, index, own),
                )
                for recorder, index, own in zip(recorders, kept, thresholds, strict=True)
            ]
        small = SmallLayer(layer, kept, terms, least)
        sparse[layer] = make_sparse(model, small, compact_layer)
    return put_together(model, selector, selections, sparse)


def stays_whole(layer: int, kept: Tensor, size: int, selector: Selector) -> bool:
    """Whether a layer that keeps these of its neurons is a dense one."""
    return kept.numel() == size and selector.active_in(layer) == 1


def least_activations(
    layer: int,
    kept: Sequence[Tensor],
    recorders: Sequence[PromptRecorder],
    selector: Selector,
) -> list[Tensor] | None:
    """Of each sequence, the least activations that count; None where none are skipped."""
    active = selector.active_in(layer)
    if active == 1:
        return None
    return [
        recorder.gates(layer).least(index, active)
        for recorder, index in zip(recorders, kept, strict=True)
    ]


def skipped_part(
    stand_in: StandIn,
    layer: int,
    recorder: PromptRecorder,
    down: DownProjection,
    kept: Tensor,
    least: Tensor | None,
) -> Tensor | None:
    """What core neurons add where they are skipped, [n, d], as `StandIn.fit` takes it; None where
    none are, or the stand-in does not ask for it.

    Args:
        recorder: of the prompt.
        down: the layer's down projection.
        kept: the core neurons, [K]; least: the least activation of each that counts, [K].
    """
    if least is None or not stand_in.fit_skipped:
        return None
    sample = recorder.sample(layer)
    small = recorder.gates(layer).skipped(kept, least, len(sample.inputs))
    return sample.skipped_part(down, kept.long(), small)


def make_sparse(
    model: ModelView, small: SmallLayer, compact_layer: Compactor[Compact]
) -> SparseLayer[Compact]:
    """Make a layer smaller."""
    sizes = [0] * len(small.kept)
    if small.terms is not None:
        sizes = [model.stand_in_bytes(term) for term in small.terms]
    return SparseLayer(compact_layer(small), sizes)


def put_together(
    model: ModelView,
    selector: Selector,
    selections: Sequence[Selection],
    sparse: Mapping[int, SparseLayer[Compact]],
) -> Chosen[Compact]:
    """The outcome, from what was selected for each sequence and the layers that made of it."""
    choices = [
        Choice(
            CoreSet(
                layers=selection.layers,
                num_neurons=model.num_neurons,
                model=model.name,
                model_fingerprint=model.fingerprint,
                selector=selector.describe(),
            ),
            sum(layer.stand_in_bytes[row] for layer in sparse.values()),
            selection.notes,
        )
        for row, selection in enumerate(selections)
    ]
    return Chosen(choices, {layer: made.compact for layer, made in sparse.items()})


def others(kept: Tensor, size: int) -> Tensor:
    """The neurons that `kept` leaves out, int64."""
    dropped = torch.ones(size, dtype=torch.bool, device=kept.device)
    dropped[kept.long()] = False
    return dropped.nonzero().squeeze(-1)
