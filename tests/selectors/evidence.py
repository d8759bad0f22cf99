"""Random prompts, as a selector sees them, beside the plain numbers they were made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.selectors import Evidence

HIDDEN = 4


@dataclass(frozen=True)
class Prompt:
    """Activations h [S, D] of each layer, and the norms of the down projection's columns [D]."""

    h: list[Tensor]
    norms: list[Tensor]

    def evidence(self, alpha: float | None = 0.4, future: Prompt | None = None) -> Evidence:
        middle = (self.h[0].shape[0] + 1) // 2
        return Evidence(
            layers=statistics(self.h, alpha),
            column_norms=self.norms.__getitem__,
            halves=(
                statistics([h[:middle] for h in self.h], alpha),
                statistics([h[middle:] for h in self.h], alpha),
            ),
            future=None if future is None else statistics(future.h, alpha),
        )


def statistics(h: Sequence[Tensor], alpha: float | None) -> list[LayerStatistics]:
    found = []
    for activations in h:
        stats = LayerStatistics.zeros(activations.shape[1], HIDDEN)
        stats.update(torch.zeros(activations.shape[0], HIDDEN), activations, alpha)
        found.append(stats)
    return found


def prompt(
    seed: int = 0, *, tokens: int = 7, sizes: Sequence[int] = (10, 10, 10), coarse: bool = False
) -> Prompt:
    """A random prompt; a coarse one has few values, so that scores are often tied."""
    generator = torch.Generator().manual_seed(seed)
    h = [torch.randn(tokens, size, generator=generator) for size in sizes]
    if coarse:
        h = [activations.round() for activations in h]
    norms = [torch.rand(size, generator=generator).double() + 0.1 for size in sizes]
    return Prompt(h, norms)


def best(scores: Sequence[tuple[float, ...]], budget: int) -> list[int]:
    """The budget's worth of neurons with the largest scores, ties to the smaller index."""
    ranked = sorted(range(len(scores)), key=lambda n: (*(-key for key in scores[n]), n))
    return sorted(ranked[:budget])
