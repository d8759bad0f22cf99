"""Exactly K neurons from their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coreinfer.errors import UserError, require_ratio


def neuron_budget(keep: float, num_neurons: int) -> int:
    """K = round(keep * D), the number of core neurons of a layer with D neurons.

    Python's round: a product that ends in exactly one half goes to the even neighbour.

    Raises:
        UserError: if keep is not in (0, 1] or is so small that K would be 0.
    """
    keep = require_ratio("the fraction of neurons to keep", keep)
    budget = round(keep * num_neurons)
    if budget == 0:
        raise UserError(
            f"keeping {keep} of {num_neurons} neurons rounds to none; "
            f"keep at least {1 / num_neurons:.4g}"
        )
    return budget


def top_neurons(keys: Sequence[Tensor], budget: int) -> Tensor:
    """The `budget` neurons with the largest keys, sorted ascending.

    Args:
        keys: scores of shape [D], the most significant first; a later one settles the ties of
            those before it, and the smaller index settles what is left.
        budget: K, at most D.

    Returns:
        Neuron indices, int32, shape [K], strictly increasing.
    """
    tied = np.arange(keys[0].numel())
    kept = np.zeros(len(tied), dtype=bool)
    left = budget
    # What is above a key's threshold is in; the next key decides between those that equal it.
    for key in keys:
        values = key.detach().cpu().numpy()[tied]
        threshold = np.partition(values, len(values) - left)[len(values) - left]
        above = tied[values > threshold]
        kept[above] = True
        left -= len(above)
        tied = tied[values == threshold]
    kept[tied[:left]] = True
    return torch.from_numpy(np.flatnonzero(kept).astype(np.int32))
