"""The sums over a corpus' tokens that a calibration is made from; additive, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coreinfer.calibration.prediction import LayerPrediction
from coreinfer.core.statistics import LayerStatistics

BASES = ("regression", "inputs")  # ways to choose a layer's basis

_RIDGE = 1e-3  # of the mean variance of x: directions far below are not worth a rank
_ROUNDING = 1e-9  # of the mean square of x: inputs that do not differ, in float32
_DEGENERATE = 1e-4  # a variance of z that should be about 1: its direction is rounding noise


@dataclass
class BasisSums:
    """What a layer's basis is chosen from.

    Attributes:
        tokens: how many were added.
        x: sum of x [d]; xx: of x x^T [d, d].
        y: sum of y [p]; xy: of x y^T [d, p], where y = sketch^T (column_norms * h).
        sketch: [D, p] float32, random directions; None is all of them, p = D.
        column_norms: |W_down[:, n]|_2, [D] float32.
    """

    tokens: int
    x: Tensor
    xx: Tensor
    y: Tensor
    xy: Tensor
    sketch: Tensor | None
    column_norms: Tensor

    @classmethod
    def zeros(cls, sketch: Tensor | None, column_norms: Tensor, hidden_size: int) -> BasisSums:
        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        d, p = hidden_size, column_norms.numel() if sketch is None else sketch.shape[1]
        return cls(
            0, empty(d), empty(d, d), empty(p), empty(d, p), sketch, column_norms.float().cpu()
        )

    def add(self, x: Tensor, h: Tensor) -> None:
        """Add tokens: x [T, d], h [T, D]."""
        weighted = h.float().cpu() * self.column_norms
        y = (weighted if self.sketch is None else weighted @ self.sketch).double()
        x = x.double().cpu()
        self.tokens += x.shape[0]
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.xx.addmm_(x.t(), x)
        self.xy.addmm_(x.t(), y)

    def basis(self, rank: int, kind: str = "regression") -> tuple[Tensor, Tensor]:
        """(x_mean [d], Q [d, r]), float32, such that z = Q^T (x - x_mean) is white.

        "regression": the inputs that predict what the neurons add best, by reduced-rank regression
        of diag(w) h on x, w the norms of the down projection's columns: Q = C^-1/2 U, with C the
        (slightly ridged) covariance of x and U the leading left singular vectors of
        C^-1/2 cov(x, diag(w) h). These are found in the range of its product with the random
        sketch (Halko, Martinsson and Tropp 2011), so that no [d, D] sum is kept; they are the true
        ones but for the sketch's randomness, or exactly where the sketch has all directions.
        r = min(rank, d, p).
        "inputs": the principal components of x, whatever the neurons make of them.
        r = min(rank, d).

        Args:
            rank: r, at most.
            kind: one of `BASES`.
        """
        mean = self.x / self.tokens
        covariance = self.xx / self.tokens - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0)
        ridge = _RIDGE * values.mean() + _ROUNDING * mean.square().mean() + 1e-30
        root = vectors * (values + ridge).rsqrt()
        if kind == "inputs":
            return mean.float(), root[:, -rank:].float().contiguous()
        across = self.xy / self.tokens - torch.outer(mean, self.y / self.tokens)
        left = torch.linalg.svd(root.t() @ across, full_matrices=False).U
        return mean.float(), (root @ left[:, : min(rank, left.shape[1])]).float()


def sketch_of(num_neurons: int, rank: int, generator: torch.Generator) -> Tensor | None:
    """Random directions of a layer's neurons, [D, p] float32; None where p = D."""
    width = sketch_width(num_neurons, rank)
    if width == num_neurons:
        return None
    return torch.randn(num_neurons, width, generator=generator)


def sketch_width(num_neurons: int, rank: int) -> int:
    """p = min(6 * rank + 32, D)."""
    return min(6 * rank + 32, num_neurons)


@dataclass
class PredictionSums:
    """What a layer's prediction is made from, given a basis.

    Attributes:
        x_mean, basis: z = basis^T (x - x_mean); [d], [d, r].
        zz: sum of [1, z] [1, z]^T, [1 + r, 1 + r]; zh: of [1, z] h^T, [1 + r, D].
    """

    x_mean: Tensor
    basis: Tensor
    zz: Tensor
    zh: Tensor

    @classmethod
    def zeros(cls, x_mean: Tensor, basis: Tensor, num_neurons: int) -> PredictionSums:
        rows = 1 + basis.shape[1]
        zz = torch.zeros(rows, rows, dtype=torch.float64)
        return cls(x_mean, basis, zz, torch.zeros(rows, num_neurons, dtype=torch.float64))

    def add(self, x: Tensor, h: Tensor) -> None:
        """Add tokens: x [T, d], h [T, D]."""
        z = torch.addmm(-(self.x_mean @ self.basis), x.float().cpu(), self.basis).double()
        z = torch.cat([z.new_ones(z.shape[0], 1), z], dim=1)
        self.zz.addmm_(z.t(), z)
        self.zh.addmm_(z.t(), h.double().cpu())

    def prediction(self, statistics: LayerStatistics) -> tuple[LayerPrediction, Tensor]:
        """The prediction, and the sum over the same tokens of its squared residual, [D].

        A ridge of one token's worth keeps a small corpus from being learnt by heart.

        Args:
            statistics: over the same tokens.
        """
        tokens = self.zz[0, 0]
        whiten, shrinkage, across = self._white()
        coefficients = torch.cat([self.zh[:1] / tokens, shrinkage * across])
        made = LayerPrediction(
            input_mean=(statistics.input_sum.cpu() / tokens).float(),
            basis=(self.basis.double() @ whiten).float(),
            coefficients=coefficients.float(),
        )
        return made, self.residual_sum(coefficients, statistics)

    def residual_sum(self, coefficients: Tensor, statistics: LayerStatistics) -> Tensor:
        """The sum over the same tokens of the squared residual of other coefficients, [D] float64.

        Args:
            coefficients: [1 + r, D], of the basis of `prediction`; 0 where that has no direction.
            statistics: over the same tokens.
        """
        tokens = self.zz[0, 0]
        *_, across = self._white()
        offset, slopes = coefficients[0].double(), coefficients[1:].double()
        mean = self.zh[0] / tokens
        explained = (2 * mean - offset) * offset + ((2 * across - slopes) * slopes).sum(dim=0)
        return (statistics.square_sum.cpu() - tokens * explained).clamp(min=0)

    def _white(self) -> tuple[Tensor, Tensor, Tensor]:
        """What makes z white, [r, r]; by how much each direction is shrunk, [r, 1]; and the
        covariance of white z with h, [r, D]."""
        tokens = self.zz[0, 0]
        z_mean, h_mean = self.zz[0, 1:] / tokens, self.zh[0] / tokens
        covariance = self.zz[1:, 1:] / tokens - torch.outer(z_mean, z_mean)
        across = self.zh[1:] / tokens - torch.outer(z_mean, h_mean)
        values, vectors = torch.linalg.eigh(covariance)
        real = values > _DEGENERATE
        whiten = vectors * torch.where(real, values.clamp(min=1e-300).rsqrt(), 0.0)
        mean_value = values.clamp(min=0).mean()
        shrunk = torch.where(real, values / (values + mean_value / tokens), 0.0).unsqueeze(1)
        return whiten, shrunk, whiten.t() @ across


def flat(sums: Sequence[BasisSums] | Sequence[PredictionSums]) -> dict[str, Tensor]:
    """The sums of all layers by name, for a checkpoint."""
    return {
        f"{name}.{layer}": value
        for layer, one in enumerate(sums)
        for name, value in vars(one).items()
        if name in _SUMS
    }


def restore(
    sums: Sequence[BasisSums] | Sequence[PredictionSums], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `flat`: put the tensors back into sums of the same shapes."""
    for layer, one in enumerate(sums):
        for name in vars(one).keys() & _SUMS:
            setattr(one, name, tensors[f"{name}.{layer}"])


_SUMS = {"x", "xx", "y", "xy", "zz", "zh"}
