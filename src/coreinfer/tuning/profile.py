"""What each layer loses alone, where no calibration has measured it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from coreinfer.core.layer_errors import LayerErrors
from coreinfer.tuning.candidate import Candidate
from coreinfer.tuning.objective import Objective

KEEPS = (0.3, 0.6)  # at which a layer is measured, all others being dense


def measured_errors(objective: Objective, part: str, layers: int) -> LayerErrors:
    """KL to dense, nats a token, with one layer sparse (`impact`, dropping), on a part."""
    candidates = [
        Candidate("impact", tuple(keep if n == layer else 1.0 for n in range(layers)))
        for layer in range(layers)
        for keep in KEEPS
    ]
    losses = [fmean(q.kl) for q in objective.measure(part, candidates, "single layers")]
    return LayerErrors((*KEEPS, 1.0), _falling(losses, layers))


def _falling(losses: Sequence[float], layers: int) -> torch.Tensor:
    """[L, keeps and 1.0] that does not rise along a row: what rose is noise."""
    rows = torch.tensor(losses, dtype=torch.float64).clamp(min=0).reshape(layers, -1)
    rows = torch.cat([rows, torch.zeros(layers, 1, dtype=torch.float64)], dim=1)
    return rows.flip(1).cummax(dim=1).values.flip(1)
