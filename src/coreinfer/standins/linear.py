"""Ridge regression of the dropped part on the MLP's input, fitted on the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.standins.base import StandIn, StandInTerms
from coreinfer.standins.sample import LayerSample


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
    sample_tokens: int = 256  # type: ignore[assignment]  # a field where the base has a property

    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if not (isinstance(self.ridge, (int, float)) and 0 < self.ridge < math.inf):
            raise UserError(f"ridge must be a number above 0, got {self.ridge!r}")
        if self.sample_tokens < 2:
            raise UserError(f"sample_tokens must be at least 2, got {self.sample_tokens}")

    def fit(self, sample: LayerSample, down: Tensor, dropped: Tensor) -> StandInTerms:
        assert sample.x is not None and sample.h is not None
        x = sample.x.float()  # [S, d]
        r = sample.h[:, dropped].float() @ down[:, dropped].float().t()  # [S, d]
        x_mean, r_mean = x.mean(dim=0), r.mean(dim=0)
        x, r = x - x_mean, r - r_mean
        left, right = _reduced_rank_ridge(x, r, self.ridge, self.rank)
        offset = r_mean - left @ (right @ x_mean)
        return StandInTerms(*(part.to(down.dtype).contiguous() for part in (offset, left, right)))


def _reduced_rank_ridge(x: Tensor, r: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
    """Factors left [d_r, k] and right [k, d_x] of M; x [S, d_x] and r [S, d_r] are centred."""
    gram = (x @ x.t()).double()  # [S, S]
    penalty = ridge * gram.diagonal().mean()
    rank = min(rank, x.shape[0], x.shape[1], r.shape[1])
    if not penalty > 0:  # one token, or tokens that do not differ
        return r.new_zeros(r.shape[1], rank), x.new_zeros(rank, x.shape[1])
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    projected = vectors.t() @ r.double()  # U^T R, [S, d_r]
    shrunk = (values / (values + penalty)).sqrt().unsqueeze(1) * projected
    # Right singular vectors of `shrunk` by the eigenvectors of the S x S side.
    energy, basis = torch.linalg.eigh(shrunk @ shrunk.t())
    energy, basis = energy[-rank:], basis[:, -rank:]
    # Directions without energy are left out: dividing by their rounding noise would amplify it.
    scale = torch.where(energy > 1e-12 * energy.max(), energy.clamp(min=1e-300).rsqrt(), 0.0)
    left = (shrunk.t() @ basis) * scale  # [d_r, k], orthonormal columns (or zero)
    dual = (projected @ left) / (values + penalty).unsqueeze(1)  # [S, k]
    right = (vectors @ dual).t().float() @ x  # [k, d_x]
    return left.float(), right
