"""Ridge regression on a sample's inputs, in its S x S form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# float32 is enough where lambda is far above its rounding of X X^T, and is half the time where the
# sample is large.
_SAFE_RIDGE = 0.1
_LARGE = 64  # tokens


@dataclass(frozen=True)
class Dual:
    """The inputs X [S, d] of a sample, centred, and lambda = ridge * mean_t |x_t|^2 over them.

    All of one dtype, float32 or float64.

    Attributes:
        mean: of the inputs, [d]; centred: X.
        gram: X X^T, [S, S].
        inverse: (X X^T + lambda)^-1; 0 where the inputs do not differ, so that nothing is fitted.
        penalty: lambda.
        varies: whether the inputs differ.
    """

    mean: Tensor
    centred: Tensor
    gram: Tensor
    inverse: Tensor
    penalty: Tensor
    varies: bool

    @classmethod
    def of(cls, x: Tensor, ridge: float) -> Dual:
        """Of the inputs x [S, d]."""
        tokens = len(x)
        wide = torch.float32 if ridge >= _SAFE_RIDGE and tokens > _LARGE else torch.float64
        mean = x.mean(dim=0, dtype=wide)
        centred = x.to(wide) - mean
        gram = centred @ centred.t()
        energy = gram.diagonal().sum()
        penalty = ridge * energy / tokens
        # False for one token, or tokens that differ by no more than their mean is rounded.
        rounding = (32 * torch.finfo(wide).eps) ** 2
        varies = bool(energy > rounding * tokens * mean.square().sum())
        return cls(mean, centred, gram, _inverse(gram, penalty, varies), penalty, varies)

    @property
    def factor(self) -> Tensor:
        """C [S, S] with C C^T = X X^T (X X^T + lambda)^-1, what ridge regression fits of targets.

        A little is added to its diagonal, as much as the inverse is rounded, for without it that
        matrix has no Cholesky factor.
        """
        tokens = len(self.gram)
        condition = self.gram.diagonal().sum() / self.penalty  # at most, of X X^T + lambda
        hat = self.inverse * -self.penalty
        hat.diagonal().add_(1 + torch.finfo(hat.dtype).eps * (condition + tokens))
        factor: Tensor = torch.linalg.cholesky(hat)
        return factor


def _inverse(gram: Tensor, penalty: Tensor, varies: bool) -> Tensor:
    if not varies:
        return torch.zeros_like(gram)
    shifted = gram.clone()
    shifted.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
