"""Scale and minimum of a group of weights in four bits: the native call, or its twin."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from coreinfer.kernels.library import native, num_threads

_CLIPPED_RANGES = (1.0, 0.9, 0.8, 0.7)  # of a group's range, to start the search from
_REFINEMENTS = 2


def fit_four_bits(grouped: Tensor, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Scales and minima of w = scale * q + minimum, q in 0..15, of small squared error.

    From several clipped ranges of the group, each refined by least squares (Lloyd's iteration), the
    best is kept. The native call adds up in another order, so that where two are about as good it
    may take the other one.

    Args:
        grouped: float32 [R, groups, g], g a multiple of 16 up to 256; finite, as is the difference
            of any two of a group in float16.
        threads: torch's own number unless given.

    Returns:
        Float32 numbers that float16 holds, [R, groups, 1] each.
    """
    library = native()
    if library is None:
        return fit_four_bits_twin(grouped)
    grouped = grouped.contiguous()
    scales, minima = torch.empty(2, *grouped.shape[:-1], 1)
    library.functions.ci_fit_four_bits(
        library.path,
        num_threads(threads),
        ctypes.c_void_p(grouped.data_ptr()),
        ctypes.c_int64(scales.numel()),
        grouped.shape[-1],
        ctypes.c_void_p(scales.data_ptr()),
        ctypes.c_void_p(minima.data_ptr()),
    )
    return scales, minima


def fit_four_bits_twin(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """What `fit_four_bits` computes, in torch."""
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    mean = grouped.mean(-1, keepdim=True)
    best_scale = best_minimum = best_error = torch.tensor(torch.inf)
    for part in _CLIPPED_RANGES:
        scale, minimum = part * (high - low) / 15, (low + high - part * (high - low)) / 2
        for refinement in range(_REFINEMENTS + 1):
            scale, minimum = (x.to(torch.float16).to(torch.float32) for x in (scale, minimum))
            q = nearest((grouped - minimum) / scale, 0, 15)
            error = (q * scale).add_(minimum).sub_(grouped).square_().sum(-1, keepdim=True)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_minimum = torch.where(better, minimum, best_minimum)
            best_error = torch.where(better, error, best_error)
            if refinement < _REFINEMENTS:
                q_mean = q.mean(-1, keepdim=True)
                q -= q_mean
                spread = q.square().sum(-1, keepdim=True)
                slope = (q * (grouped - mean)).sum(-1, keepdim=True) / spread
                scale = torch.where(spread > 0, slope, scale)
                minimum = mean - scale * q_mean
    return best_scale, best_minimum


def nearest(quotients: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers in low..high; where float16 rounds a scale to 0, q is 0 or low."""
    return quotients.nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(low, high)
