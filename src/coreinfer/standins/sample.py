"""A bounded, order-independent sample of a prompt's tokens, for fitting a stand-in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from coreinfer.core.statistics import column_sum

# 2^64 / golden ratio, as a signed 64-bit integer: multiples of it spread evenly.
_GOLDEN = -7046029254386353131
_ROUNDING = 1e-28  # (float64 epsilon)^2, with room for the rounding of a mean over tokens


@dataclass(frozen=True)
class Spectrum:
    """The MLP's inputs of a sample, centred, and the eigenvectors of their Gram matrix.

    Attributes:
        mean: [d]; centred: [n, d]; both float64.
        values: [n] ascending, not negative; vectors: [n, n], a column each.
            centred @ centred.T = vectors @ diag(values) @ vectors.T
    """

    mean: Tensor
    centred: Tensor
    values: Tensor
    vectors: Tensor

    @property
    def varies(self) -> bool:
        """False for one token, or tokens that differ by no more than their mean is rounded."""
        energy = self.values.sum()  # the trace of the Gram matrix: sum_t |x_t - x_mean|^2
        return bool(energy > _ROUNDING * len(self.values) * self.mean.square().sum())


@dataclass
class LayerSample:
    """Inputs and activations of sampled tokens of one MLP layer, and the exact mean of all.

    A token is kept when the hash of its position is among the `capacity` smallest, so the sample
    depends on the tokens alone, not on how the prefill was chunked or batched.

    Attributes:
        capacity: how many tokens are kept at most.
        positions: [n] int64; x: [n, d]; h: [n, D]; None before the first token.
        h_sum: sum over all tokens seen, [D] float64; None before the first.
        tokens: how many tokens were seen.
    """

    capacity: int
    positions: Tensor | None = None
    x: Tensor | None = None
    h: Tensor | None = None
    h_sum: Tensor | None = None
    tokens: int = 0
    _spectrum: Spectrum | None = field(default=None, init=False, repr=False)

    def update(self, x: Tensor, h: Tensor, positions: Tensor) -> None:
        """Add tokens: x [T, d], h [T, D], their positions in the sequence [T]."""
        if positions.numel() == 0:
            return
        x, h = x.detach(), h.detach()
        h_sum = column_sum(h)
        self.h_sum = h_sum if self.h_sum is None else self.h_sum + h_sum
        self.tokens += positions.numel()
        if self.capacity == 0:
            return
        kept = self._sampled(positions)  # first among the new ones alone, to copy less
        positions, x, h = positions[kept], x[kept], h[kept]
        if self.positions is not None and self.x is not None and self.h is not None:
            positions = torch.cat([self.positions, positions])
            x, h = torch.cat([self.x, x]), torch.cat([self.h, h])
            kept = self._sampled(positions)
            positions, x, h = positions[kept], x[kept], h[kept]
        self.positions, self.x, self.h = positions, x, h
        self._spectrum = None

    def _sampled(self, positions: Tensor) -> Tensor:
        """Which of these positions are sampled, ascending."""
        return torch.argsort(positions * _GOLDEN)[: self.capacity].sort().values

    def spectrum(self) -> Spectrum:
        """Of the sampled tokens; worked out once, for it does not depend on what is dropped.

        Raises:
            ValueError: if no token was sampled.
        """
        if self._spectrum is None:
            if self.x is None:
                raise ValueError("no token was sampled")
            x = self.x.double()
            mean = x.mean(dim=0)
            centred = x - mean
            values, vectors = torch.linalg.eigh(centred @ centred.t())
            self._spectrum = Spectrum(mean, centred, values.clamp(min=0), vectors)
        return self._spectrum
