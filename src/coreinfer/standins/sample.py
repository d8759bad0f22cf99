"""A bounded, order-independent sample of a prompt's tokens, for fitting a stand-in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# 2^64 / golden ratio, as a signed 64-bit integer: multiples of it spread evenly.
_GOLDEN = -7046029254386353131


@dataclass
class LayerSample:
    """Inputs and activations of sampled tokens of one MLP layer, and the exact mean of all.

    A token is kept when the hash of its position is among the `capacity` smallest, so the sample
    depends on the tokens alone, not on how the prefill was chunked or batched.

    Attributes:
        capacity: how many tokens are kept at most.
        positions: [n] int64; x: [n, d]; h: [n, D].
        x_sum, h_sum: sums over all tokens seen; None before the first.
        tokens: how many tokens were seen.
    """

    capacity: int
    positions: Tensor | None = None
    x: Tensor | None = None
    h: Tensor | None = None
    x_sum: Tensor | None = None
    h_sum: Tensor | None = None
    tokens: int = 0

    def update(self, x: Tensor, h: Tensor, positions: Tensor) -> None:
        """Add tokens: x [T, d], h [T, D], their positions in the sequence [T]."""
        if positions.numel() == 0:
            return
        x, h = x.detach(), h.detach()
        x_sum, h_sum = x.sum(dim=0, dtype=torch.float64), h.sum(dim=0, dtype=torch.float64)
        self.x_sum = x_sum if self.x_sum is None else self.x_sum + x_sum
        self.h_sum = h_sum if self.h_sum is None else self.h_sum + h_sum
        self.tokens += positions.numel()
        if self.capacity == 0:
            return
        if self.positions is not None and self.x is not None and self.h is not None:
            positions = torch.cat([self.positions, positions])
            x, h = torch.cat([self.x, x]), torch.cat([self.h, h])
        if positions.numel() > self.capacity:
            kept = torch.argsort(positions * _GOLDEN)[: self.capacity].sort().values
            positions, x, h = positions[kept], x[kept], h[kept]
        self.positions, self.x, self.h = positions, x, h
