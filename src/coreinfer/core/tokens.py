"""Which tokens of a prompt are sampled: by their positions alone, however it is read."""

from __future__ import annotations

import torch
from torch import Tensor

# 2^64 / golden ratio, as a signed 64-bit integer: multiples of it spread evenly.
_GOLDEN = -7046029254386353131


def spread_order(positions: Tensor) -> Tensor:
    """The order [n] of positions [n] of which every beginning is spread evenly over them."""
    return torch.argsort(positions * _GOLDEN)
