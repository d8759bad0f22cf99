"""Control: a random set of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import require_whole
from coreinfer.selectors.base import LayerSource, Selector


@dataclass(frozen=True, kw_only=True)
class Random(Selector):
    """Keeps neurons drawn at random, the same for every prompt.

    Args:
        seed: of the draw, 0 to 2^64 - 1; layers differ, prompts do not.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("seed", self.seed, 0, 2**64 - 1)

    def by_layer(self, num_neurons: Sequence[int]) -> LayerSource | None:
        # The draw takes the place of a statistic: one generator runs through the layers in order.
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [torch.rand(d, generator=generator, dtype=torch.float64) for d in num_neurons]
        return lambda layer, own: replace(own, positive_sum=drawn[layer])

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return (statistics.positive_sum,)
