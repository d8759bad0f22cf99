"""Residual: the neurons that a prediction from the MLP's input cannot replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from coreinfer.calibration.store import CalibrationStore
from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import require_whole
from coreinfer.selectors.base import LayerSource, Selector


@dataclass(frozen=True, kw_only=True)
class Residual(Selector):
    """Scores neuron n by |h_n - prediction of n|_2 over the prompt times |W_down[:, n]|_2.

    The prediction is the calibration's, linear in the MLP's input: what it says right of a dropped
    neuron, the calibrated stand-in adds. The corpus' mean squared residual of the neuron counts as
    `prior_tokens` more tokens of the prompt, for a short prompt says little of rare activations.

    Args:
        calibration: a calibration store made for this model.
        prior_tokens: how many tokens of prompt the corpus outweighs, from 0.
    """

    calibration: CalibrationStore
    prior_tokens: int = 200

    name: ClassVar[str] = "residual"
    needs_column_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("prior_tokens", self.prior_tokens, 0)

    @property
    def recorded_calibration(self) -> CalibrationStore | None:
        return self.calibration

    def check(self, num_neurons: Sequence[int], fingerprint: str, model: str) -> None:
        self.calibration.require_model(fingerprint, model)
        super().check(num_neurons, fingerprint, model)

    def by_layer(self, num_neurons: Sequence[int]) -> LayerSource | None:
        corpus = self.calibration.corpus_statistics()

        def of_layer(layer: int, own: LayerStatistics) -> LayerStatistics:
            prior = corpus[layer].scaled(self.prior_tokens / corpus[layer].tokens)
            return replace(own, residual_sum=_residual(own) + _residual(prior))

        return of_layer

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return (_residual(statistics).sqrt() * column_norms,)


def _residual(statistics: LayerStatistics) -> Tensor:
    if statistics.residual_sum is None:
        raise ValueError("the residual was not recorded")
    return statistics.residual_sum
