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

OVERSAMPLING = 2


@dataclass(frozen=True, kw_only=True)
class Linear(StandIn):
    """Adds r_mean + M (x - x_mean), with M of rank `rank`, for r_t = W_down[:, rest] h_t[rest].

    M is the best matrix of that rank for W_down[:, rest] P, where P predicts the dropped
    activations: over the prompt's sampled tokens it minimises
    sum_t |h_t - h_mean - P (x_t - x_mean)|^2 + lambda |P|^2 among the matrices of rank
    OVERSAMPLING * `rank`, with lambda = ridge * mean_t |x_t - x_mean|^2. At full rank that is the
    ridge regression of r_t itself; below it, W_down meets so many vectors instead of every token.
    (Of `rank` vectors alone the KL would be a tenth higher on a ReLU model; of twice as many it is
    that of the best M to 2 %.)

    P is solved in the S x S dual: with X, H the centred rows and X X^T = U diag(s) U^T, the
    full-rank minimiser is H^T (X X^T + lambda)^-1 X, and the best one of rank k projects it on the
    k leading right singular vectors of diag(sqrt(s / (s + lambda))) U^T H (reduced-rank ridge
    regression).

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
        h = sample.h.index_select(1, dropped).float()  # [S, rest]
        h_mean = h.mean(dim=0)
        directions, right = _reduced_rank_ridge(
            spectrum, h - h_mean, self.ridge, OVERSAMPLING * self.rank
        )
        moved = down(torch.cat([directions.t(), h_mean[None]]), dropped).double()
        left, right = _cut(moved[:-1].t(), right, self.rank)
        r_mean = moved[-1]
        offset = r_mean - left @ (right @ spectrum.mean)
        return StandInTerms(*(part.to(down.dtype).contiguous() for part in (offset, left, right)))


def check_ridge(ridge: float) -> None:
    """Raises UserError unless it is a finite number above 0."""
    number = isinstance(ridge, (int, float)) and not isinstance(ridge, bool)
    if not number or not 0 < ridge < math.inf:
        raise UserError(f"ridge must be a finite number above 0, got {ridge!r}")


def _cut(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best matrix of a rank for left [d, n] right [n, d]: factors again.

    Best by the ridge's own measure, in which the rows of `right` are orthonormal.
    """
    basis = torch.linalg.eigh(left.t() @ left).eigenvectors[:, -rank:]
    return left @ basis, basis.t() @ right


def _reduced_rank_ridge(x: Spectrum, h: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
    """Factors left [K, k] and right [k, d] of P, k = min(rank, S, d, K).

    The rows of right are orthonormal in the product a (X^T X + lambda) b of the objective.

    Args:
        x: of the inputs [S, d]; h: the centred targets, [S, K] float32.
    """
    tokens, width = x.centred.shape
    rank = min(rank, tokens, width, h.shape[1])
    energy = x.values.sum()  # the trace of the Gram matrix: sum_t |x_t - x_mean|^2
    if not x.varies:
        return h.new_zeros(h.shape[1], rank), x.centred.new_zeros(rank, width)
    penalty = ridge * energy / tokens
    # With w = sqrt(s / (s + lambda)), v = 1 / (w (s + lambda)) and F = diag(w) U^T H, the full-rank
    # solution is F^T diag(v) U^T X. To project it on right singular vectors of F is to put B B^T
    # into its middle, B the left ones: (F^T B) (B^T diag(v) U^T X). But for the Gram matrix of H,
    # H meets thin matrices alone.
    weights = (x.values / (x.values + penalty)).sqrt()
    vectors = x.vectors * weights
    gram = (h @ h.t()).double()
    basis = torch.linalg.eigh(vectors.t() @ gram @ vectors).eigenvectors[:, -rank:]
    left = h.t() @ (vectors @ basis).float()
    # Where inputs have no energy, U^T X is rounding noise.
    has_energy = x.values > 1e-12 * x.values.max()
    inverse = torch.where(has_energy, 1 / (weights * (x.values + penalty)), 0.0)
    right = (x.vectors * inverse @ basis).t() @ x.centred
    return left, right
