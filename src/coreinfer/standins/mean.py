"""The mean of the dropped part over the prompt: a constant vector a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coreinfer.standins.base import StandIn, StandInTerms
from coreinfer.standins.down import DownProjection
from coreinfer.standins.sample import LayerSample


@dataclass(frozen=True, kw_only=True)
class Mean(StandIn):
    """Adds r_mean = W_down[:, rest] mean_t h_t[rest]."""

    name: ClassVar[str] = "mean"

    @property
    def sample_tokens(self) -> int:
        return 0

    def fit(
        self,
        layer: int,
        sample: LayerSample,
        down: DownProjection,
        dropped: Tensor,
        known: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> StandInTerms:
        if sample.h_sum is None:
            raise ValueError("no token was recorded")
        if known is not None:
            r_mean = known[-sample.tokens :].mean(dim=0)  # the first token is not in the sample
        else:
            r_mean = down((sample.h_sum / sample.tokens)[dropped].unsqueeze(0), dropped)[0]
        return StandInTerms(offset=r_mean.to(down.dtype))
