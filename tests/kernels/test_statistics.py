"""Sums over tokens on every path, against the sums written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.kernels.statistics import activation_sums, activation_sums_twin
from tests.kernels.paths import PATHS, using

# Few values, so that ties are common; zeros of both signs, tiny and huge ones among them.
VALUES = st.sampled_from([-3.0, -1e-40, -0.0, 0.0, 1e-40, 0.25, 1.0, 1.0000001, 2.0, 1e30])


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    tokens, neurons = draw(st.integers(0, 6)), draw(st.integers(1, 40))
    numbers = draw(st.lists(VALUES, min_size=tokens * neurons, max_size=tokens * neurons))
    return torch.tensor(numbers, dtype=torch.float32).view(tokens, neurons)


def naive_counts(h: Tensor, tops: list[int]) -> list[int]:
    counts = [0] * h.shape[1]
    for row in h.tolist():
        positive = [n for n, value in enumerate(row) if value > 0]
        for n in sorted(positive, key=lambda n: (-row[n], n))[: tops[len(positive)]]:
            counts[n] += 1
    return counts


@pytest.mark.parametrize("path", PATHS)
@given(h=activations(), data=st.data(), threads=st.integers(1, 3))
def test_sums_are_the_definition(path: str, h: Tensor, data: st.DataObject, threads: int) -> None:
    tops = [data.draw(st.integers(0, positives)) for positives in range(h.shape[1] + 1)]
    with using(path):
        sums = activation_sums(h, torch.tensor(tops), threads)
        without = activation_sums(h, None, threads)
    exact = h.double()
    squares = exact.square()
    norms = squares.sum(dim=1, keepdim=True)
    units = torch.where(norms > 0, squares / norms, 0.0)
    for found in (sums, without):
        torch.testing.assert_close(found.square_sum, squares.sum(dim=0), rtol=1e-13, atol=0)
        torch.testing.assert_close(found.unit_square_sum, units.sum(dim=0), rtol=1e-12, atol=1e-300)
    assert sums.counts is not None
    assert sums.positive_sum is not None
    assert sums.counts.tolist() == naive_counts(h, tops)
    torch.testing.assert_close(sums.positive_sum, exact.clamp(min=0).sum(dim=0), rtol=1e-13, atol=0)
    assert without.counts is None
    assert without.positive_sum is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (3, 17), (33, 1536), (5, 11008)])
def test_rows_of_wider_activations_of_every_dtype(path: str, tokens: int, neurons: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, neurons + 5, generator=generator)
    tops = (torch.arange(neurons + 1) * 0.4).ceil().long()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        h = wide.to(dtype)[:, 5:]
        with using(path):
            sums = activation_sums(h, tops)
        expected = activation_sums_twin(h.double(), tops)
        assert sums.counts is not None
        assert expected.counts is not None
        assert sums.counts.dtype == torch.int64
        assert torch.equal(sums.counts, expected.counts)
        torch.testing.assert_close(sums.square_sum, expected.square_sum, rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_numbers_that_are_not_finite_are_seen_and_harm_nothing(path: str) -> None:
    h = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 1.0, -1.0]])
    with using(path):
        sums = activation_sums(h, torch.tensor([0, 1, 2, 3]))
    assert not sums.square_sum.isfinite().all()
    assert sums.square_sum[2] == 5.0


@pytest.mark.parametrize("path", PATHS)
def test_rows_are_added_up_in_their_order(path: str) -> None:
    """So that the result does not depend on how many threads there are."""
    h = torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    with using(path):
        one, three = (activation_sums(h, None, threads) for threads in (1, 3))
    assert torch.equal(one.square_sum, three.square_sum)
    assert torch.equal(one.unit_square_sum, three.unit_square_sum)
