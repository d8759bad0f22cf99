"""The mean stand-in, the token sample, and the registry."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.standins import (
    STAND_INS,
    Calibrated,
    DenseDown,
    LayerSample,
    Linear,
    Mean,
    StandIn,
)

D, HIDDEN = 8, 3


def some_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, HIDDEN, generator=generator)
    return x, torch.randn(count, D, generator=generator), torch.arange(count)


def sampled(capacity: int, sizes: list[int]) -> LayerSample:
    """A sample fed in chunks of these sizes."""
    sample = LayerSample(capacity)
    x, h, positions = some_tokens(sum(sizes))
    for chunk in zip(x.split(sizes), h.split(sizes), positions.split(sizes), strict=True):
        sample.update(*chunk)
    return sample


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 20))
def test_the_sample_does_not_depend_on_the_chunks(sizes: list[int], capacity: int) -> None:
    chunked, whole = sampled(capacity, sizes), sampled(capacity, [sum(sizes)])
    assert chunked.tokens == whole.tokens == sum(sizes)
    if sum(sizes) == 0:
        assert chunked.positions is None
        return
    for name in ("positions", "x", "h"):
        assert torch.equal(getattr(chunked, name), getattr(whole, name))
    torch.testing.assert_close(chunked.h_sum, whole.h_sum)


@given(st.integers(1, 60), st.integers(1, 20))
def test_the_sample_is_bounded_and_in_order(tokens: int, capacity: int) -> None:
    sample = sampled(capacity, [tokens])
    x, h, _ = some_tokens(tokens)
    assert sample.positions is not None
    positions = sample.positions.tolist()
    assert len(positions) == min(tokens, capacity)
    assert positions == sorted(set(positions))
    assert torch.equal(sample.x, x[positions])
    assert torch.equal(sample.h, h[positions])


def test_the_sample_is_spread_over_the_prompt() -> None:
    positions = sampled(32, [1024]).positions
    assert positions is not None
    per_quarter = torch.histc(positions.float(), bins=4, min=0, max=1023)
    assert per_quarter.min() >= 6  # 8 of 32 would be even


def test_a_short_prompt_is_sampled_whole() -> None:
    assert sampled(16, [5, 7]).positions.tolist() == list(range(12))  # type: ignore[union-attr]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_mean_is_that_of_the_dropped_part_over_all_tokens(sizes: list[int]) -> None:
    dropped = torch.tensor([1, 2, 6])
    down = torch.randn(HIDDEN, D, generator=torch.Generator().manual_seed(1))
    _, h, _ = some_tokens(sum(sizes))
    expected = (h[:, dropped].double() @ down[:, dropped].double().T).mean(dim=0).float()
    for capacity in (0, 2):  # all tokens, whatever is sampled beside
        terms = Mean().fit(0, sampled(capacity, sizes), DenseDown(down), dropped)
        torch.testing.assert_close(terms.offset, expected)
        assert terms.left is None
        assert terms.right is None
        assert terms.num_weights == HIDDEN


@pytest.mark.parametrize("stand_in", [Mean(), Linear()])
def test_dropping_nothing_adds_nothing(stand_in: StandIn) -> None:
    down = torch.randn(HIDDEN, D, generator=torch.Generator().manual_seed(1))
    terms = stand_in.fit(0, sampled(9, [9]), DenseDown(down), torch.empty(0, dtype=torch.long))
    assert not terms.offset.any()
    if terms.left is not None and terms.right is not None:
        assert not (terms.left @ terms.right).any()


@pytest.mark.parametrize("stand_in", [Mean(), Linear()])
def test_no_token_at_all_is_a_callers_mistake(stand_in: StandIn) -> None:
    with pytest.raises(ValueError, match="no token"):
        stand_in.fit(0, LayerSample(4), DenseDown(torch.ones(HIDDEN, D)), torch.tensor([0]))


def test_stand_ins_are_registered_by_their_names() -> None:
    assert dict(STAND_INS) == {"mean": Mean, "linear": Linear, "calibrated": Calibrated}
    assert all(name == kind.name for name, kind in STAND_INS.items())


def test_descriptions_are_complete_json() -> None:
    assert Mean().describe() == {"name": "mean"}
    described = json.loads(json.dumps(Linear(rank=3, ridge=0.1).describe()))
    assert described == {
        "name": "linear", "rank": 3, "ridge": 0.1, "sample_tokens": 256, "fit_skipped": False,
    }  # fmt: skip
    assert Linear(**{k: v for k, v in described.items() if k != "name"}) == Linear(
        rank=3, ridge=0.1
    )
