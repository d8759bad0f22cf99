"""Sums over the tokens of a prefill, neuron by neuron: the native call, or its twin."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coreinfer.kernels.library import native, num_threads

# Elements of a block of rows: small enough that its float64 copy stays in the processor's cache.
BLOCK = 1 << 17


@dataclass(frozen=True)
class ActivationSums:
    """Over the tokens of h [T, D], for each neuron, [D].

    Attributes:
        square_sum: of h^2; unit_square_sum: of (h / |h|_2)^2; both float64.
        positive_sum: of the positive h, float64; None unless tops were given.
        counts: of the tokens that it is one of the top neurons of, int64; None likewise.
    """

    square_sum: Tensor
    unit_square_sum: Tensor
    positive_sum: Tensor | None
    counts: Tensor | None


def activation_sums(h: Tensor, tops: Tensor | None, threads: int | None = None) -> ActivationSums:
    """The sums of activations h [T, D], on any device.

    Args:
        tops: int64 [D + 1], how many of a token's largest positive entries count where it has p
            positive ones; None counts nothing, which spares more time than the other sums take.
        threads: torch's own number unless given.
    """
    library = native()
    if library is None or h.device.type != "cpu" or h.dtype is torch.float64:
        return activation_sums_twin(h, tops)
    h = h.float()  # exact for the narrower types
    if h.stride(1) != 1:
        h = h.contiguous()
    neurons = h.shape[1]
    sums = torch.zeros(2 if tops is None else 3, neurons, dtype=torch.float64)
    counts = None if tops is None else torch.zeros(neurons, dtype=torch.int64)
    library.functions.ci_statistics(
        library.path,
        num_threads(threads),
        ctypes.c_void_p(h.data_ptr()),
        ctypes.c_int64(h.stride(0)),
        ctypes.c_int64(h.shape[0]),
        ctypes.c_int64(neurons),
        ctypes.c_void_p(None if tops is None else tops.data_ptr()),
        *(ctypes.c_void_p(row.data_ptr()) for row in sums[:2]),
        ctypes.c_void_p(None if tops is None else sums[2].data_ptr()),
        ctypes.c_void_p(None if counts is None else counts.data_ptr()),
    )
    return ActivationSums(sums[0], sums[1], None if tops is None else sums[2], counts)


def activation_sums_twin(h: Tensor, tops: Tensor | None) -> ActivationSums:
    """What `activation_sums` computes, in torch and numpy."""
    size = max(1, BLOCK // max(1, h.shape[1]))
    sums = torch.zeros(3, h.shape[1], dtype=torch.float64, device=h.device)
    counts = torch.zeros(h.shape[1], dtype=torch.int64, device=h.device)
    for block in torch.split(h, size):
        # float64, so that neither the order of chunks nor a square moves a near-tie
        exact = block.double()
        squares = exact.square()
        norms = squares.sum(dim=-1)
        units = torch.where(norms > 0, norms.reciprocal(), 0.0)
        sums[:2] += torch.stack([torch.ones_like(units), units]) @ squares
        if tops is not None:
            sums[2] += exact.clamp(min=0).sum(dim=0)
            counts += top_mask(block, tops).sum(dim=0)
    if tops is None:
        return ActivationSums(sums[0], sums[1], None, None)
    return ActivationSums(sums[0], sums[1], sums[2], counts)


def top_mask(h: Tensor, tops: Tensor) -> Tensor:
    """Which entries of h [T, D] are among the tops[p] largest of the p positive ones of their row.

    Equal ones go to the smaller index. bool [T, D].
    """
    h = h.detach()
    top = tops.to(h.device)[(h > 0).sum(dim=-1)]
    if h.device.type == "cpu":
        # Narrower types are exact in float32, and numpy has no bfloat16.
        wide = h if h.dtype is torch.float64 else h.float()
        return torch.from_numpy(_top_mask(wide.numpy(), top.numpy()))
    return top_mask_by_sort(h, top)


def top_mask_by_sort(h: Tensor, top: Tensor) -> Tensor:
    """The top[t] largest entries of each row of h [T, D], as it is defined, on any device."""
    order = h.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(h.shape[-1], device=h.device) < top.unsqueeze(-1)
    return torch.zeros_like(first).scatter(-1, order, first)


def _top_mask(h: NDArray[np.floating], top: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The same on a CPU, where numpy's vectorised partial sort is twenty times faster."""
    threshold = np.full((h.shape[0], 1), np.inf, dtype=h.dtype)
    for token in np.flatnonzero(top):
        threshold[token] = np.partition(h[token], -top[token])[-top[token]]
    mask: NDArray[np.bool_] = h >= threshold
    surplus = np.count_nonzero(mask, axis=-1) - top
    for token in np.flatnonzero(surplus > 0):  # of the equal ones, those that come last go
        tied = np.flatnonzero(h[token] == threshold[token])
        mask[token, tied[-surplus[token] :]] = False
    return mask
