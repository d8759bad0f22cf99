"""Ridge regression of the dropped part on the MLP's input, fitted on the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coreinfer.errors import UserError, require_whole
from coreinfer.standins.base import StandIn, StandInTerms
from coreinfer.standins.down import DownProjection
from coreinfer.standins.dual import Dual
from coreinfer.standins.sample import LayerSample


@dataclass(frozen=True, kw_only=True)
class Linear(StandIn):
    """Adds r_mean + M (x - x_mean), with M of rank `rank`.

    M minimises sum_t |r_t - r_mean - M (x_t - x_mean)|^2 + lambda |M|^2 over the prompt's sampled
    tokens among the matrices of that rank, with lambda = ridge * mean_t |x_t - x_mean|^2, where
    r_t = W_down[:, rest] h_t[rest]. It is solved in the S x S dual: with X, R the centred rows, the
    full-rank minimiser is R^T (X X^T + lambda)^-1 X, and the best one of rank k projects it on the
    k leading eigenvectors of R^T H R, H = X X^T (X X^T + lambda)^-1 (reduced-rank ridge
    regression).

    A prompt with fewer than two usable tokens leaves M = 0: the stand-in is then their mean.

    Args:
        rank: of M, at least 1; decode adds 2 * rank * d multiplications a layer.
        ridge: c of the penalty, above 0.
        sample_tokens: prompt tokens to fit on at most.
        fit_skipped: fit it to what is left out of core neurons that are skipped as well, which
            takes selection one more product.
    """

    rank: int = 32
    ridge: float = 0.3
    sample_tokens: int = 256
    fit_skipped: bool = False

    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        require_whole("rank", self.rank, 1)
        check_ridge(self.ridge)
        require_whole("sample_tokens", self.sample_tokens, 2)

    def fit(
        self,
        layer: int,
        sample: LayerSample,
        down: DownProjection,
        dropped: Tensor,
        known: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> StandInTerms:
        r = sample.left_out(down, dropped, known, skipped)
        dual = Dual.of(sample.inputs, self.ridge)
        r_mean = r.mean(dim=0, dtype=dual.mean.dtype)
        left, right = _reduced_rank(dual, r - r_mean, self.rank)
        offset = r_mean - left @ (right @ dual.mean)
        return StandInTerms(*(part.to(down.dtype).contiguous() for part in (offset, left, right)))


def check_ridge(ridge: float) -> None:
    """Raises UserError unless it is a finite number above 0."""
    number = isinstance(ridge, (int, float)) and not isinstance(ridge, bool)
    if not number or not 0 < ridge < math.inf:
        raise UserError(f"ridge must be a finite number above 0, got {ridge!r}")


def _reduced_rank(x: Dual, r: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors left [d_r, k] and right [k, d_x] of M, k = min(rank, S, d_x, d_r).

    Args:
        x: of the inputs [S, d_x]; r: the centred targets, [S, d_r].
    """
    tokens, width = x.centred.shape
    rank = min(rank, tokens, width, r.shape[1])
    if not x.varies:
        return r.new_zeros(r.shape[1], rank), r.new_zeros(rank, width)
    # With H = C C^T, the eigenvectors of R^T H R by those of its S x S side C^T R R^T C. But for
    # the Gram matrix, R meets thin matrices alone.
    factor, gram = x.factor, r @ r.t()
    seen = gram @ factor
    squares, basis = torch.linalg.eigh(factor.t() @ seen)
    squares, basis = squares[-rank:], basis[:, -rank:]
    # Directions without energy are left out: dividing by their rounding noise would amplify it.
    least = 8 * torch.finfo(r.dtype).eps * squares[-1]
    basis = basis * torch.where(squares > least, squares.clamp(min=least).rsqrt(), 0.0)
    left = r.t() @ (factor @ basis)  # orthonormal columns (or zero)
    right = (x.inverse @ (seen @ basis)).t() @ x.centred  # R left = R R^T C basis
    return left, right
