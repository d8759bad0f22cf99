"""What selection needs to know of a Hugging Face model, and its layers cut down to core neurons."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from coreinfer.backends import choose as shared
from coreinfer.backends.choose import Chosen, SmallLayer, evidence_of
from coreinfer.backends.hf.compact import CompactMlp, compact_mlp
from coreinfer.core.measures import ReadCost
from coreinfer.models.mlp import MlpLayer, fingerprint, mlp_layers, read_cost
from coreinfer.recording import PromptRecorder
from coreinfer.selectors import Selector
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import DenseDown, StandIn, StandInTerms

__all__ = ["Anatomy", "choose", "evidence_of"]


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

    def down(self, layer: int) -> DenseDown:
        return DenseDown(self.layers[layer].output.weight.detach())

    def stand_in_bytes(self, terms: StandInTerms) -> int:
        """Bytes that decode reads for the stand-in of a layer: it has the dtype of the weights."""
        return terms.num_weights * terms.offset.element_size()

    def check(self, selector: Selector, stand_in: StandIn | None = None) -> None:
        """Raises UserError if the selector or the stand-in does not fit this model."""
        shared.check(self, selector, stand_in)


def choose(
    anatomy: Anatomy,
    recorders: Sequence[PromptRecorder],
    evidence: Sequence[Evidence],
    selector: Selector,
    stand_in: StandIn | None,
) -> Chosen[CompactMlp]:
    """Select each sequence's core neurons, gather their weights and fit the stand-ins.

    Raises:
        UserError: if the selector does not fit the model.
    """

    def compact(small: SmallLayer) -> CompactMlp:
        return compact_mlp(anatomy.layers[small.layer], small.kept, small.terms, small.least)

    return shared.choose(anatomy, recorders, evidence, selector, stand_in, compact)
