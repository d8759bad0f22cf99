"""The search for four-bit scales: the native call against its twin, both against brute force."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import pytest
import torch
from torch import Tensor

from coreinfer.kernels.formats import GROUP_SIZES
from coreinfer.kernels.four_bits import fit_four_bits, fit_four_bits_twin, nearest
from coreinfer.kernels.library import kernel_path
from tests.kernels.paths import NATIVE, using

KINDS = {
    "normal": lambda w: w,
    "far from zero": lambda w: w + 100,
    "outliers": lambda w: w * (1 + 40 * (torch.rand_like(w) > 0.97)),
    "few values": lambda w: w.round(),
    "tiny": lambda w: w * 1e-7,
    "equal": lambda w: torch.full_like(w, 0.3),
    "zero": torch.zeros_like,
}


def groups(kind: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    torch.manual_seed(size)
    return KINDS[kind](torch.randn(7, 9, size, generator=generator))


def error(grouped: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Squared, of each group, in float64."""
    q = nearest((grouped - minima) / scales, 0, 15)
    return (q.double() * scales + minima - grouped).square().sum(-1)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_search_is_as_good_as_the_twins(kind: str, size: int, path: str) -> None:
    grouped = groups(kind, size)
    with using(path):
        found = fit_four_bits(grouped, threads=2)
        assert all(
            torch.equal(*pair) for pair in zip(found, fit_four_bits(grouped, 1), strict=True)
        )
    wanted = fit_four_bits_twin(grouped)
    for numbers in found:
        assert numbers.shape == (7, 9, 1)
        assert torch.equal(numbers, numbers.half().float())
    # Sums in another order may take another of two that are about as good.
    floor = 1e-12 * grouped.double().square().sum(-1)
    assert (error(grouped, *found) <= 1.02 * error(grouped, *wanted) + floor).all()
    same = (found[0] == wanted[0]) & (found[1] == wanted[1])
    assert same.float().mean() > 0.9


@pytest.mark.skipif(kernel_path() == "twin", reason="no native kernels were built")
def test_searches_of_one_thread_run_side_by_side() -> None:
    """While one takes long, no other one waits for it."""
    small, large = groups("normal", 32), groups("normal", 64).repeat(10000, 1, 1)
    wanted = fit_four_bits(small, threads=1)
    waits = []
    with ThreadPoolExecutor(1) as pool:
        began = perf_counter()
        long = pool.submit(fit_four_bits, large, 1)
        while not long.done():
            asked = perf_counter()
            found = fit_four_bits(small, threads=1)
            waits.append(perf_counter() - asked)
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert max(waits) < (perf_counter() - began) / 2


@pytest.mark.parametrize("path", [*NATIVE, None])
def test_few_scales_and_minima_are_better(path: str | None) -> None:
    """Against a fine grid of both: within a few percent of the least error there is."""
    grouped = groups("normal", 32)[:1, :4]
    if path is None:
        found = fit_four_bits_twin(grouped)
    else:
        with using(path):
            found = fit_four_bits(grouped)
    span = grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)
    least = torch.full((1, 4), torch.inf, dtype=torch.float64)
    for part in torch.linspace(0.5, 1.1, 40):
        for shift in torch.linspace(-0.2, 0.2, 40):
            scale = part * span / 15
            minimum = grouped.amin(-1, keepdim=True) + (shift + (1 - part) / 2) * span
            least = torch.minimum(least, error(grouped, scale, minimum))
    assert (error(grouped, *found) <= 1.15 * least).all()
