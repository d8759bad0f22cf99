"""The least-squares prediction of a layer's neurons from the MLP's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerPrediction:
    """h ~ coefficients^T [1, z], with z = basis^T (x - input_mean), for all neurons of a layer.

    The basis is scaled so that over the calibration corpus the entries of z are uncorrelated and
    have a variance of 1 each (0, where the inputs do not have so many directions).

    Attributes:
        input_mean: [d]; basis: [d, r].
        coefficients: [1 + r, D]; the first row is the mean of h. All float32.
    """

    input_mean: Tensor
    basis: Tensor
    coefficients: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.basis.shape[1]

    def features(self, x: Tensor) -> Tensor:
        """[1, z] of inputs x [T, d], [T, 1 + r] float32."""
        mean, basis = self.input_mean.to(x.device), self.basis.to(x.device)
        z = torch.addmm(-(mean @ basis), x.float(), basis)
        return torch.cat([z.new_ones(z.shape[0], 1), z], dim=1)

    def residual(self, x: Tensor, h: Tensor) -> Tensor:
        """h - prediction, at inputs x [T, d] with activations h [T, D]; [T, D] float32."""
        coefficients = self.coefficients.to(h.device)
        return torch.addmm(h.float(), self.features(x), coefficients, alpha=-1)
