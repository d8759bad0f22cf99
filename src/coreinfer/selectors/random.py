"""Control: a random set of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.errors import require_whole
from coreinfer.selectors.base import Selector
from coreinfer.selectors.evidence import Evidence


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

    def source(self, evidence: Evidence) -> tuple[Sequence[LayerStatistics], dict[str, Any]]:
        # The draw takes the place of a statistic: one generator runs through the layers in order.
        generator = torch.Generator().manual_seed(self.seed)
        drawn = []
        for layer in evidence.layers:
            stats = LayerStatistics.zeros(layer.num_neurons, layer.input_sum.numel())
            stats.positive_sum = torch.rand(
                layer.num_neurons, generator=generator, dtype=torch.float64
            )
            drawn.append(stats)
        return drawn, {}

    def keys(self, statistics: LayerStatistics, column_norms: Tensor) -> tuple[Tensor, ...]:
        return (statistics.positive_sum,)
