"""What each layer loses at each keep: measured once by calibration, consumed by budgets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from coreinfer.errors import UserError


@dataclass(frozen=True, eq=False)
class LayerErrors:
    """The error profile of a model: what its layers lose when they keep a part of their neurons.

    Attributes:
        keeps: fractions of a layer's neurons, in (0, 1], ascending, at least one.
        errors: [L, len(keeps)] float64, finite, not negative, not increasing along a row. The unit
            is KL(dense || sparse) of the next-token distributions, nats a token, where that layer
            alone is sparse; it is the same for all layers, so they may be added and compared.

    Raises:
        UserError: if they are not so.
    """

    keeps: tuple[float, ...]
    errors: Tensor

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.keeps))
        if not self.keeps or not ascending or not all(0 < keep <= 1 for keep in self.keeps):
            raise UserError(f"keeps must ascend within 0 to 1, got {list(self.keeps)}")
        errors, expected = self.errors, (self.errors.shape[0], len(self.keeps))
        if errors.dim() != 2 or tuple(errors.shape) != expected or errors.dtype != torch.float64:
            raise UserError(
                f"layer errors must be float64 [layers, {len(self.keeps)}], "
                f"got {errors.dtype} {tuple(errors.shape)}"
            )
        if not bool(errors.isfinite().all()) or bool((errors < 0).any()):
            raise UserError("layer errors must be finite numbers, not negative")
        if bool((errors.diff(dim=1) > 0).any()):
            raise UserError("a layer's error must not grow with what it keeps")

    @property
    def num_layers(self) -> int:
        return self.errors.shape[0]
