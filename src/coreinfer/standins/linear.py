"""Ridge regression of the dropped part on the MLP's input, fitted on the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coreinfer.errors import UserError, require_whole
from coreinfer.standins.base import DownProjection, StandIn, StandInTerms
from coreinfer.standins.sample import LayerSample, Spectrum


@dataclass(frozen=True, kw_only=True)
class Linear(StandIn):
    """Adds r_mean + M (x - x_mean), with M of rank `rank`.

    M minimises sum_t |r_t - r_mean - M (x_t - x_mean)|^2 + lambda |M|^2 over the prompt's sampled
    tokens among the matrices of that rank, with lambda = ridge * mean_t |x_t - x_mean|^2, where
    r_t = W_down[:, rest] h_t[rest]. It is solved in the S x S dual: with X, R the centred rows and
    X X^T = U diag(s) U^T, the full-rank minimiser is M = R^T (X X^T + lambda)^-1 X, and the best
    one of rank k projects it on the k leading right singular vectors of
    diag(sqrt(s / (s + lambda))) U^T R (reduced-rank ridge regression).

    A prompt with fewer than two usable tokens leaves M = 0: the stand-in is then their mean.

    Args:
        rank: of M, at least 1; decode adds 2 * rank * d multiplications a layer.
        ridge: c of the penalty, above 0.
        sample_tokens: prompt tokens to fit on at most.
    """

    rank: int = 32
    ridge: float = 0.3
    sample_tokens: int = 256

    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        require_whole("rank", self.rank, 1)
        check_ridge(self.ridge)
        require_whole("sample_tokens", self.sample_tokens, 2)

    def fit(
        self, layer: int, sample: LayerSample, down: DownProjection, dropped: Tensor
    ) -> StandInTerms:
        if sample.h is None:
            raise ValueError("no token was sampled")
        spectrum = sample.spectrum()
        r = down(sample.h.index_select(1, dropped), dropped).double()  # [S, d]
        r_mean = r.mean(dim=0)
        left, right = _reduced_rank_ridge(spectrum, r - r_mean, self.ridge, self.rank)
        offset = r_mean - left @ (right @ spectrum.mean)
        return StandInTerms(*(part.to(down.dtype).contiguous() for part in (offset, left, right)))


def check_ridge(ridge: float) -> None:
    """Raises UserError unless it is a finite number above 0."""
    number = isinstance(ridge, (int, float)) and not isinstance(ridge, bool)
    if not number or not 0 < ridge < math.inf:
        raise UserError(f"ridge must be a finite number above 0, got {ridge!r}")


def _reduced_rank_ridge(x: Spectrum, r: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
    """Factors left [d_r, k] and right [k, d_x] of M, k = min(rank, S, d_x, d_r).

    Args:
        x: of the inputs [S, d_x]; r: the centred targets, [S, d_r] float64.
    """
    tokens, width = x.centred.shape
    rank = min(rank, tokens, width, r.shape[1])
    energy = x.values.sum()  # the trace of the Gram matrix: sum_t |x_t - x_mean|^2
    if not x.varies:
        return r.new_zeros(r.shape[1], rank), r.new_zeros(rank, width)
    penalty = ridge * energy / tokens
    # With P = U^T R and w = sqrt(s / (s + lambda)): the right singular vectors of diag(w) P, by the
    # eigenvectors of its S x S side. But for its Gram matrix, R meets thin matrices alone.
    weights = (x.values / (x.values + penalty)).sqrt()
    vectors = x.vectors * weights
    squares, basis = torch.linalg.eigh(vectors.t() @ (r @ r.t()) @ vectors)
    squares, basis = squares[-rank:], basis[:, -rank:]
    # Directions without energy are left out: dividing by their rounding noise would amplify it.
    scale = torch.where(squares > 1e-12 * squares.max(), squares.clamp(min=1e-300).rsqrt(), 0.0)
    left = r.t() @ (vectors @ basis * scale)  # [d_r, k], orthonormal columns (or zero)
    dual = x.vectors.t() @ (r @ left) / (x.values + penalty).unsqueeze(1)  # [S, k]
    return left, (x.vectors @ dual).t() @ x.centred  # right: [k, d_x]
