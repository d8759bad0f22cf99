"""From what the prefill recorded to core sets and the matrices that decode with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coreinfer.backends.base import Choice
from coreinfer.backends.hf.compact import CompactMlp, compact_mlp
from coreinfer.core.coreset import CoreSet
from coreinfer.core.measures import ReadCost
from coreinfer.errors import UserError
from coreinfer.models.mlp import MlpLayer, fingerprint, mlp_layers, read_cost
from coreinfer.recording import PromptRecorder, RecordingPlan
from coreinfer.selectors import Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import StandIn, StandInTerms


class Anatomy:
    """What core-neuron decoding needs to know of a live model, worked out when asked for."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.layers: tuple[MlpLayer, ...] = mlp_layers(model)
        self.name = name
        self._model = model
        self._norms: dict[int, Tensor] = {}

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self._model, self.layers)

    @cached_property
    def cost(self) -> ReadCost:
        return read_cost(self._model, self.layers)

    @property
    def bos_token_id(self) -> int | None:
        bos = self._model.config.get_text_config().bos_token_id
        return bos if isinstance(bos, int) else None

    @property
    def num_neurons(self) -> tuple[int, ...]:
        return tuple(layer.num_neurons for layer in self.layers)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(num_neurons, hidden_size) of every layer."""
        return [(layer.num_neurons, layer.hidden_size) for layer in self.layers]

    def column_norms(self, layer: int) -> Tensor:
        """|W_down[:, n]|_2, [D]; computed once a layer."""
        if layer not in self._norms:
            self._norms[layer] = self.layers[layer].column_norms()
        return self._norms[layer]

    def check(self, selector: Selector) -> None:
        """Raises UserError if the selector does not fit this model."""
        selector.check(self.num_neurons, self.fingerprint, self.name)


@dataclass(frozen=True)
class Chosen:
    """The outcome for a batch: one choice a sequence, and the compact layers of all of them."""

    choices: list[Choice]
    compact: dict[int, CompactMlp]


def evidence_of(
    anatomy: Anatomy,
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
                column_norms=anatomy.column_norms,
                halves=recorder.halves(),
                future=None if futures is None else futures[row].statistics(),
                text=None if texts is None else texts[row],
            )
        )
    return found


def choose(
    anatomy: Anatomy,
    recorders: Sequence[PromptRecorder],
    evidence: Sequence[Evidence],
    selector: Selector,
    stand_in: StandIn | None,
) -> Chosen:
    """Select each sequence's core neurons, gather their weights and fit the stand-ins.

    A layer that keeps all its neurons stays dense, so keeping 100 % is exactly dense decoding.

    Raises:
        UserError: if the selector does not fit the model.
    """
    anatomy.check(selector)
    asked, recorded = RecordingPlan.of(selector, stand_in), recorders[0].plan
    if not recorded.covers(asked):
        raise ValueError(f"the prefill recorded {recorded}, selection needs {asked}")
    selections = [selector.select(one) for one in evidence]
    compact: dict[int, CompactMlp] = {}
    stand_in_bytes = [0] * len(recorders)
    for layer in anatomy.layers:
        kept = [s.layers[layer.index] for s in selections if layer.index in s.layers]
        if not kept or kept[0].numel() == layer.num_neurons:
            continue
        terms = None
        if stand_in is not None:
            terms = [
                fit_stand_in(stand_in, layer, recorder, index)
                for recorder, index in zip(recorders, kept, strict=True)
            ]
            element = layer.output.weight.element_size()
            for row, term in enumerate(terms):
                stand_in_bytes[row] += term.num_weights * element
        compact[layer.index] = compact_mlp(layer, kept, terms)
    choices = [
        Choice(
            CoreSet(
                layers=selection.layers,
                num_neurons=anatomy.num_neurons,
                model=anatomy.name,
                model_fingerprint=anatomy.fingerprint,
                selector=selector.describe(),
            ),
            bytes_,
            selection.notes,
        )
        for selection, bytes_ in zip(selections, stand_in_bytes, strict=True)
    ]
    return Chosen(choices, compact)


def fit_stand_in(
    stand_in: StandIn, layer: MlpLayer, recorder: PromptRecorder, kept: Tensor
) -> StandInTerms:
    """The stand-in of one layer for the neurons that `kept` leaves out."""
    down = layer.output.weight.detach()
    dropped = torch.ones(layer.num_neurons, dtype=torch.bool)
    dropped[kept.long()] = False
    return stand_in.fit(
        recorder.sample(layer.index), down, dropped.nonzero().squeeze(-1).to(down.device)
    )
