"""Statistics are sums over tokens: whatever the split, the whole comes out."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.core.statistics import LayerStatistics, PromptStatistics, token_core_mask

D, HIDDEN, ALPHA = 11, 4, 0.4
SUMS = ("positive_sum", "square_sum", "unit_square_sum", "input_sum")


def some_tokens(count: int, seed: int = 0, size: int = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, HIDDEN, generator=generator),
        torch.randn(count, size, generator=generator),
    )


def recorded(x: Tensor, h: Tensor, alpha: float | None = ALPHA) -> LayerStatistics:
    stats = LayerStatistics.zeros(h.shape[1], x.shape[1])
    stats.update(x, h, alpha)
    return stats


def assert_same(a: LayerStatistics, b: LayerStatistics) -> None:
    assert torch.equal(a.counts.double(), b.counts.double())
    assert a.tokens == b.tokens
    for name in SUMS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-13, atol=1e-13)


def test_sums_are_what_they_say() -> None:
    x, h = some_tokens(9)
    stats = recorded(x, h)
    tokens = [[float(value) for value in row] for row in h.double()]
    lengths = [sum(v * v for v in row) for row in tokens]
    assert stats.counts.tolist() == token_core_mask(h, ALPHA).sum(dim=0).tolist()
    assert stats.counts.dtype == torch.int64
    for n in range(D):
        column = [row[n] for row in tokens]
        assert float(stats.positive_sum[n]) == pytest.approx(sum(v for v in column if v > 0))
        assert float(stats.square_sum[n]) == pytest.approx(sum(v * v for v in column))
        assert float(stats.unit_square_sum[n]) == pytest.approx(
            sum(v * v / length for v, length in zip(column, lengths, strict=True))
        )
    torch.testing.assert_close(stats.input_sum, x.double().sum(dim=0))
    assert stats.tokens == 9


def test_unit_squares_of_a_token_add_up_to_one() -> None:
    x, h = some_tokens(6)
    assert float(recorded(x, h).unit_square_sum.sum()) == pytest.approx(6)


def test_a_token_of_zeros_adds_nothing_but_itself() -> None:
    stats = recorded(torch.ones(1, HIDDEN), torch.zeros(1, D))
    assert stats.is_finite
    assert stats.tokens == 1
    for name in ("counts", "positive_sum", "square_sum", "unit_square_sum"):
        assert not getattr(stats, name).any()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 99))
def test_any_split_of_the_tokens_gives_the_same(sizes: list[int], seed: int) -> None:
    x, h = some_tokens(sum(sizes), seed)
    streamed = LayerStatistics.zeros(D, HIDDEN)
    merged = LayerStatistics.zeros(D, HIDDEN)
    for x_part, h_part in zip(x.split(sizes), h.split(sizes), strict=True):
        streamed.update(x_part, h_part, ALPHA)
        merged = merged + recorded(x_part, h_part)
    whole = recorded(x, h)
    assert_same(streamed, whole)
    assert_same(merged, whole)


def test_without_alpha_neither_counts_nor_their_tie_break_are_recorded() -> None:
    x, h = some_tokens(5)
    with_counts, without = recorded(x, h), recorded(x, h, None)
    assert with_counts.counts.any()
    assert not without.counts.any()
    assert not without.positive_sum.any()
    for name in ("square_sum", "unit_square_sum", "input_sum"):
        assert torch.equal(getattr(with_counts, name), getattr(without, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_summed_as_their_exact_values(dtype: torch.dtype) -> None:
    x, h = some_tokens(40)
    x, h = x.to(dtype), h.to(dtype)
    assert_same(recorded(x, h), recorded(x.float(), h.float()))


def test_activations_whose_squares_float32_cannot_hold_are_still_finite() -> None:
    assert recorded(torch.ones(1, HIDDEN), torch.full((1, D), 1e30)).is_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("alpha", [None, ALPHA])
def test_one_activation_that_is_not_finite_is_noticed(bad: float, alpha: float | None) -> None:
    x, h = some_tokens(5)
    h[3, 2] = bad
    assert not recorded(x, h, alpha).is_finite


def test_gradients_are_not_followed() -> None:
    x, h = some_tokens(3)
    stats = recorded(x.requires_grad_(), h.requires_grad_())
    sums = [getattr(stats, f.name) for f in fields(stats)]
    assert not any(one.requires_grad for one in sums if isinstance(one, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_recorded_is_left_as_it_was(dtype: torch.dtype) -> None:
    x, h = (part.to(dtype) for part in some_tokens(5))
    before = x.clone(), h.clone()
    recorded(x, h)
    assert torch.equal(x, before[0])
    assert torch.equal(h, before[1])


def test_statistics_do_not_hold_on_to_what_they_were_given() -> None:
    x, h = some_tokens(3)
    stats, expected = recorded(x, h), recorded(x, h)
    h.zero_()
    x.zero_()
    assert_same(stats, expected)


@given(st.floats(0, 8), st.integers(0, 9))
def test_scaled_counts_every_token_that_many_times(weight: float, seed: int) -> None:
    stats = recorded(*some_tokens(4, seed))
    scaled = stats.scaled(weight)
    assert scaled.tokens == weight * 4
    for name in ("counts", *SUMS):
        torch.testing.assert_close(
            getattr(scaled, name), weight * getattr(stats, name).double(), rtol=1e-15, atol=0
        )


def test_scaling_by_two_is_adding_twice() -> None:
    stats = recorded(*some_tokens(4))
    assert_same(stats.scaled(2), stats + stats)


def test_prompts_merge_layer_by_layer_with_the_bos_token_apart() -> None:
    x, h = some_tokens(8)
    sizes = [(D, HIDDEN), (D, HIDDEN)]
    first, second = PromptStatistics.zeros(sizes), PromptStatistics.zeros(sizes)
    first.bos[0].update(x[:1], h[:1], ALPHA)
    first.layers[0].update(x[1:4], h[1:4], ALPHA)
    second.layers[0].update(x[4:], h[4:], ALPHA)
    merged = first + second
    assert_same(merged.layers[0], recorded(x[1:], h[1:]))
    assert_same(merged.bos[0], recorded(x[:1], h[:1]))
    assert merged.layers[1].tokens == 0
