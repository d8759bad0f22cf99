"""What a prefill leaves for a selector to choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from coreinfer.core.statistics import LayerStatistics


@dataclass(frozen=True)
class Evidence:
    """All that is known of one prompt when its core neurons are chosen.

    Attributes:
        layers: the prompt's statistics, one entry a layer.
        column_norms: layer -> |W_down[:, n]|_2, shape [D].
        halves: the statistics of the first and of the second half of the prompt's tokens, where
            the selector asked for them.
        future: statistics of the tokens that follow the prompt, for the oracle control.
        text: the prompt as text, where the caller knows it.
    """

    layers: Sequence[LayerStatistics]
    column_norms: Callable[[int], Tensor]
    halves: tuple[Sequence[LayerStatistics], Sequence[LayerStatistics]] | None = None
    future: Sequence[LayerStatistics] | None = None
    text: str | None = None

    @property
    def tokens(self) -> int:
        return int(self.layers[0].tokens)
