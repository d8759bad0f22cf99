"""Which activations are too small: the threshold of a prompt, however the prompt is read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.core.coreset import CoreSet
from coreinfer.core.measures import THRESHOLD_BYTES, ReadCost
from coreinfer.core.skipping import SAMPLED, GateStatistics
from coreinfer.core.tokens import spread_order

D = 20


def prompt(tokens: int, seed: int = 0, neurons: int = D) -> tuple[Tensor, Tensor]:
    """Gates and what they are multiplied by, which differs by neuron."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(tokens, neurons, generator=generator)
    return gates, torch.randn(tokens, neurons, generator=generator) * torch.logspace(-1, 1, neurons)


def recorded(
    gates: Tensor, ups: Tensor, cuts: tuple[int, ...] = (), capacity: int = SAMPLED
) -> GateStatistics:
    statistics = GateStatistics(capacity)
    ends = (0, *sorted(cuts), len(gates))
    for start, end in pairwise(ends):
        positions = 1 + torch.arange(start, end)
        statistics.update(gates[start:end], (gates * ups)[start:end], positions)
    return statistics


kept_sets = st.sets(st.integers(0, D - 1), min_size=1).map(lambda s: torch.tensor(sorted(s)))


@given(st.integers(1, SAMPLED), kept_sets, st.floats(0.01, 1), st.integers(0, 99))
def test_so_many_of_a_prompts_own_activations_count(
    tokens: int, kept: Tensor, active: float, seed: int
) -> None:
    gates, ups = prompt(tokens, seed)
    least = recorded(gates, ups).least(kept.int(), active)
    count = int((gates[:, kept].abs() >= least * (1 - 1e-6)).sum())
    assert count == max(1, round(active * tokens * len(kept)))
    # Those that count add more, by the size of what they are multiplied by, than any of the others.
    added = (gates.abs() * ups.square().mean(dim=0).sqrt())[:, kept].flatten().sort().values
    counted = gates[:, kept].abs() >= least * (1 - 1e-6)
    sizes = (gates.abs() * ups.square().mean(dim=0).sqrt())[:, kept]
    torch.testing.assert_close(sizes[counted].sort().values, added[-count:])


@given(st.integers(2, 3 * SAMPLED), st.data())
def test_a_prompt_in_pieces_has_the_same_thresholds(tokens: int, data: st.DataObject) -> None:
    gates, ups = prompt(tokens)
    cuts = data.draw(st.sets(st.integers(1, tokens - 1), max_size=4))
    whole, parts = recorded(gates, ups), recorded(gates, ups, tuple(cuts))
    kept = torch.arange(0, D, 2)
    torch.testing.assert_close(whole.least(kept, 0.4), parts.least(kept, 0.4))
    assert whole.tokens == parts.tokens == tokens
    assert whole.gates is not None
    assert len(whole.gates) == min(tokens, SAMPLED)


@given(st.integers(2, 3 * SAMPLED), st.integers(1, 2 * SAMPLED), st.data())
def test_what_is_skipped_at_sampled_tokens(tokens: int, asked: int, data: st.DataObject) -> None:
    gates, ups = prompt(tokens)
    cuts = data.draw(st.sets(st.integers(1, tokens - 1), max_size=3))
    statistics = recorded(gates, ups, tuple(cuts), capacity=2 * SAMPLED)
    kept = torch.arange(0, D, 3)
    least = statistics.least(kept, 0.4)
    # How many are kept is no matter to the thresholds.
    torch.testing.assert_close(least, recorded(gates, ups).least(kept, 0.4))
    asked = min(asked, tokens)
    rows = spread_order(1 + torch.arange(tokens))[:asked].sort().values
    small = statistics.skipped(kept.int(), least, asked)
    assert torch.equal(small, gates[rows][:, kept].abs() < least * (1 - 1e-6))
    if asked == tokens <= SAMPLED:
        assert int((~small).sum()) == max(1, round(0.4 * small.numel()))


@pytest.mark.parametrize("relu", [False, True])
def test_where_nothing_is_multiplied_all_neurons_have_one_threshold(relu: bool) -> None:
    gates, _ = prompt(30)
    gates = (gates + torch.linspace(-0.5, 1, D)).relu() if relu else gates
    statistics = GateStatistics()
    statistics.update(gates, gates, torch.arange(30))
    least = statistics.least(torch.arange(D), 0.25)
    torch.testing.assert_close(least, least[:1].expand(D))
    assert float((gates.abs() >= least * (1 - 1e-6)).float().mean()) == 0.25


def test_a_gate_that_was_never_open_is_taken_for_one_like_the_others() -> None:
    gates, ups = prompt(30)
    gates[:, 3] = 0
    statistics = recorded(gates, ups)
    kept = torch.arange(D)
    least = statistics.least(kept, 0.8)
    assert least.isfinite().all()
    others = kept[kept != 3]
    sizes = ups.square().mean(dim=0).sqrt()
    typical = sizes[others].square().mean().sqrt()
    torch.testing.assert_close(least[3] * typical, least[4] * sizes[4])
    # Without a gate it is multiplied by 1, as every other is.
    plain = GateStatistics()
    plain.update(gates.relu(), gates.relu(), torch.arange(30))
    least = plain.least(kept, 0.25)
    torch.testing.assert_close(least, least[:1].expand(D))
    closed = GateStatistics()
    closed.update(torch.zeros(4, D), torch.zeros(4, D), torch.arange(4))
    assert closed.least(kept, 0.5).tolist() == [0.0] * D


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        GateStatistics().least(torch.arange(3), 0.5)
    with pytest.raises(ValueError, match="no token"):
        GateStatistics().skipped(torch.arange(3), torch.ones(3), 1)
    with pytest.raises(ValueError, match="of 5 tokens are kept, not of 6"):
        recorded(*prompt(5)).skipped(torch.arange(3), torch.ones(3), 6)
    statistics = GateStatistics()
    statistics.update(torch.zeros(0, D), torch.zeros(0, D), torch.zeros(0, dtype=torch.long))
    assert statistics.tokens == 0


def test_bytes_of_neurons_of_which_some_are_skipped() -> None:
    cost = ReadCost(1000, (90, 60), (100, 50), behind_gate=(60, 30))
    assert cost.neuron(0) == cost.neuron(0, 1.0) == 90
    assert cost.neuron(0, 0.5) == 30 + THRESHOLD_BYTES + 30
    assert cost.neuron(1, 0.25) == 30 + THRESHOLD_BYTES + 7.5
    core_set = CoreSet({0: torch.arange(25, dtype=torch.int32)}, (100, 50))
    assert cost.skipped(core_set, lambda _layer: 1.0) == 0
    assert cost.skipped(core_set, lambda _layer: 0.5) == 25 * (30 - THRESHOLD_BYTES)
