"""The calibration's prediction of the dropped part, with the prompt's own correction on top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coreinfer.calibration.store import CalibrationStore
from coreinfer.errors import require_whole
from coreinfer.standins.base import StandIn, StandInTerms
from coreinfer.standins.down import DownProjection
from coreinfer.standins.dual import Dual
from coreinfer.standins.linear import check_ridge
from coreinfer.standins.sample import LayerSample


@dataclass(frozen=True, kw_only=True)
class Calibrated(StandIn):
    """Adds r_mean + M (x - x_mean), with M of rank `rank`, where the corpus says most of M.

    The calibration predicts each neuron as h_n ~ b_n . z + mean_n, z = Q^T (x - input_mean), so it
    predicts the dropped part with A Q^T x, A = W_down[:, rest] B[rest]. What that leaves of the
    prompt's sampled tokens is fitted by ridge regression in the S x S dual, as in `Linear`: E its
    rows and X the centred inputs, N = E^T (X X^T + lambda)^-1 X, lambda = ridge * mean |x|^2.
    A Q^T + N is then cut to rank `rank` where it costs least: projected on the leading
    directions of what it gives at the prompt's tokens and at `prior_tokens` tokens like those of
    the corpus (of which z is white, so that A's own columns stand for them).

    Args:
        calibration: a calibration store made for this model.
        rank: of M, at least 1; decode adds 2 * rank * d multiplications a layer.
        ridge: c of the penalty, above 0.
        sample_tokens: prompt tokens to fit on at most.
        prior_tokens: what the corpus weighs in the choice of M's directions, from 0.
        fit_skipped: fit it to what is left out of core neurons that are skipped as well, which
            takes selection one more product.
    """

    calibration: CalibrationStore
    rank: int = 64
    ridge: float = 3.0
    sample_tokens: int = 256
    prior_tokens: int = 200
    fit_skipped: bool = False

    name: ClassVar[str] = "calibrated"

    def __post_init__(self) -> None:
        require_whole("rank", self.rank, 1)
        check_ridge(self.ridge)
        require_whole("sample_tokens", self.sample_tokens, 2)
        require_whole("prior_tokens", self.prior_tokens, 0)

    def check(self, fingerprint: str, model: str) -> None:
        self.calibration.require_model(fingerprint, model)

    def fit(
        self,
        layer: int,
        sample: LayerSample,
        down: DownProjection,
        dropped: Tensor,
        known: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> StandInTerms:
        prediction = self.calibration.predictions[layer]
        r = sample.left_out(down, dropped, known, skipped)
        coefficients = prediction.coefficients[1:].to(r.device)  # the mean is the prompt's own
        predicted = down(coefficients.index_select(1, dropped), dropped)  # [r, d]
        dual = Dual.of(sample.inputs, self.ridge)
        x_mean, centred, r_mean = dual.mean.float(), dual.centred.float(), r.mean(dim=0)
        basis = prediction.basis.to(r.device)
        said = (centred @ basis) @ predicted  # [S, d]
        correction = dual.inverse.float() @ (r - r_mean - said)  # [S, d]: N = correction^T centred
        fitted = said + dual.gram.float() @ correction
        directions = _leading(
            torch.cat([fitted, self.prior_tokens**0.5 * predicted]), self.rank
        )  # [d, k]
        right = (directions.t() @ predicted.t()) @ basis.t()
        right += (directions.t() @ correction.t()) @ centred
        offset = r_mean - directions @ (right @ x_mean)
        return StandInTerms(*(p.to(down.dtype).contiguous() for p in (offset, directions, right)))


def _leading(rows: Tensor, rank: int) -> Tensor:
    """The `rank` leading right singular vectors of rows [n, d], [d, k] float32, in columns.

    k = min(rank, n, d), or d where that is asked for: then they are not looked for, since nothing
    is cut. Where the rows do not have so many directions, any others fill up.
    """
    if rank >= rows.shape[1]:
        return torch.eye(rows.shape[1], device=rows.device)
    rank = min(rank, *rows.shape)
    if rows.shape[0] > rows.shape[1]:
        vectors: Tensor = torch.linalg.eigh((rows.t() @ rows).double()).eigenvectors
        return vectors[:, -rank:].float()
    vectors = torch.linalg.eigh((rows @ rows.t()).double()).eigenvectors
    directions: Tensor = torch.linalg.qr(rows.t() @ vectors[:, -rank:].float()).Q
    return directions
