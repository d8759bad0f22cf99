"""The mean of the dropped part over the prompt: a constant vector a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coreinfer.standins.base import DownProjection, StandIn, StandInTerms
from coreinfer.standins.sample import LayerSample


@dataclass(frozen=True, kw_only=True)
class Mean(StandIn):
    """Adds r_mean = W_down[:, rest] mean_t h_t[rest]."""

    name: ClassVar[str] = "mean"

    @property
    def sample_tokens(self) -> int:
        return 0

    def fit(
        self, layer: int, sample: LayerSample, down: DownProjection, dropped: Tensor
    ) -> StandInTerms:
        if sample.h_sum is None:
            raise ValueError("no token was recorded")
        h_mean = (sample.h_sum / sample.tokens)[dropped]
        return StandInTerms(offset=down(h_mean.unsqueeze(0), dropped)[0].to(down.dtype))
