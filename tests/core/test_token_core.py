"""Token-wise core neurons, against the definition written out token by token."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.core.statistics import token_core_mask, token_core_sizes
from coreinfer.errors import UserError
from coreinfer.kernels.statistics import top_mask_by_sort

# Few values, so that ties are common; zeros of both signs and negatives among them.
VALUES = st.sampled_from([-3.0, -0.5, -0.0, 0.0, 0.25, 1.0, 1.5, 2.0])
ALPHAS = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    tokens, neurons = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    numbers = draw(st.lists(VALUES, min_size=tokens * neurons, max_size=tokens * neurons))
    return torch.tensor(numbers).view(tokens, neurons)


def naive_core(token: list[float], alpha: float) -> set[int]:
    """C_alpha of one token: alpha read as the decimal number that was written."""
    positive = [n for n, value in enumerate(token) if value > 0]
    size = max(1, math.ceil(Fraction(str(alpha)) * len(positive)))
    return set(sorted(positive, key=lambda n: (-token[n], n))[:size])


def as_sets(mask: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@given(activations(), ALPHAS)
def test_mask_is_the_definition(h: Tensor, alpha: float) -> None:
    assert as_sets(token_core_mask(h, alpha)) == [naive_core(row, alpha) for row in h.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mask_is_the_definition_in_every_dtype(dtype: torch.dtype) -> None:
    # bfloat16 has so few values that most thresholds are tied
    h = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [naive_core(row, 0.3) for row in h.float().tolist()]
    assert as_sets(token_core_mask(h, 0.3)) == expected


@given(activations(), ALPHAS)
def test_the_way_of_other_devices_agrees(h: Tensor, alpha: float) -> None:
    sizes = token_core_sizes((h > 0).sum(dim=-1), alpha)
    assert torch.equal(top_mask_by_sort(h, sizes), token_core_mask(h, alpha))


def test_sizes_are_the_exact_ceiling_for_every_alpha_of_two_decimals() -> None:
    positives = torch.arange(1, 3000)
    for hundredths in range(1, 101):
        exact = (hundredths * positives + 99) // 100
        assert torch.equal(token_core_sizes(positives, hundredths / 100), exact), hundredths


@given(st.integers(1, 100_000), ALPHAS)
def test_size_is_the_exact_ceiling(positives: int, alpha: float) -> None:
    expected = math.ceil(Fraction(str(alpha)) * positives)
    assert int(token_core_sizes(torch.tensor([positives]), alpha)) == expected


def test_size_does_not_rise_with_the_rounding_of_a_product() -> None:
    assert 0.07 * 100 > 7  # the rounding in question
    assert token_core_sizes(torch.tensor([100]), 0.07).tolist() == [7]


def test_a_token_keeps_at_least_one_neuron() -> None:
    assert token_core_mask(torch.tensor([[0.5, -1.0, 0.25]]), 1e-9).tolist() == [
        [True, False, False]
    ]


def test_a_token_without_a_positive_activation_has_no_core_neuron() -> None:
    assert not token_core_mask(torch.tensor([[0.0, -1.0, -0.0], [-2.0, -3.0, 0.0]]), 1.0).any()


def test_alpha_one_is_every_positive_activation() -> None:
    h = torch.randn(7, 90, generator=torch.Generator().manual_seed(1))
    assert torch.equal(token_core_mask(h, 1.0), h > 0)


def test_one_neuron() -> None:
    assert token_core_mask(torch.tensor([[2.0], [-2.0]]), 0.4).tolist() == [[True], [False]]


def test_no_token() -> None:
    assert token_core_mask(torch.empty(0, 5), 0.4).shape == (0, 5)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.1, math.nan, math.inf, "0.4", None, True])
def test_alpha_out_of_range_is_refused(alpha: object) -> None:
    with pytest.raises(UserError, match=r"alpha must be .*above 0 and at most 1, got"):
        token_core_mask(torch.ones(1, 4), alpha)  # type: ignore[arg-type]
