"""The down projection of a layer, as a stand-in is fitted on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class DownProjection(Protocol):
    """W_down of a layer [d, D], known by what it does: a backend may never hold it whole."""

    @property
    def dtype(self) -> torch.dtype:
        """What the terms of a stand-in are computed with in decode."""
        ...

    def __call__(self, h: Tensor, neurons: Tensor) -> Tensor:
        """h [n, K] of these neurons [K] int64 -> their part of the output, [n, d] float32.

        h @ W_down[:, neurons].T, in the precision that the backend's prefill multiplies in.
        """
        ...


@dataclass(frozen=True)
class DenseDown:
    """A down projection that is a matrix in memory."""

    weight: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def __call__(self, h: Tensor, neurons: Tensor) -> Tensor:
        neurons = neurons.to(self.weight.device)
        return h.float() @ self.weight.index_select(1, neurons).float().t()
