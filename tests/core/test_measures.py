"""Measures, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.core.coreset import CoreSet
from coreinfer.core.measures import ReadCost, jaccard, mean_overlap, overlap, stability_curve

SETS = st.sets(st.integers(0, 12))


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@given(SETS, SETS)
def test_jaccard_is_intersection_over_union(a: set[int], b: set[int]) -> None:
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert jaccard(indices(*a), indices(*b)) == expected == jaccard(indices(*b), indices(*a))


def test_overlap_is_taken_where_both_are_sparse() -> None:
    a = {0: indices(1, 2, 3), 1: indices(0), 5: indices(4)}
    b = {0: indices(2, 3, 4), 1: indices(0), 7: indices(4)}
    assert overlap(a, b) == {0: 2 / 4, 1: 1.0}
    assert mean_overlap(a, b) == 0.75
    assert mean_overlap({0: indices(1)}, {1: indices(1)}) == 1.0


def test_stability_curve_compares_with_the_last() -> None:
    sets = [CoreSet({0: indices(*s)}, (8,)) for s in ((0, 1), (0, 2), (2, 3), (2, 3))]
    assert stability_curve(sets) == [0.0, 1 / 3, 1.0, 1.0]
    assert stability_curve([]) == []


def test_bytes_by_hand() -> None:
    cost = ReadCost(shared=1000, per_neuron=(6, 10), num_neurons=(100, 50))
    core_set = CoreSet({0: indices(*range(25))}, (100, 50))
    assert cost.mlp == 1100
    assert cost.dense == 2100
    assert cost.sparse(core_set) == 1000 + 25 * 6 + 50 * 10
    assert cost.sparse(core_set, stand_in=64) == 1000 + 25 * 6 + 50 * 10 + 64
    assert cost.sparse(CoreSet({}, (100, 50))) == cost.dense


@pytest.mark.parametrize("keep", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("mlp_share", [2 / 3, 0.59])
def test_the_ceiling_is_amdahls(keep: float, mlp_share: float) -> None:
    mlp = round(mlp_share * 1_000_000)
    cost = ReadCost(shared=1_000_000 - mlp, per_neuron=(1,), num_neurons=(mlp,))
    assert cost.ceiling(keep) == pytest.approx(1 / (1 - mlp_share * (1 - keep)), rel=1e-5)


def test_the_ceiling_of_a_small_model_at_half_of_its_neurons() -> None:
    # MLP 59 % of what is read: keeping half of it cannot give more than 1.42 times
    cost = ReadCost(shared=41, per_neuron=(1,), num_neurons=(59,))
    assert round(cost.ceiling(0.5), 2) == 1.42


def test_the_ceiling_is_reached_by_a_set_of_that_density() -> None:
    cost = ReadCost(shared=500, per_neuron=(4, 4), num_neurons=(10, 10))
    half = CoreSet({0: indices(*range(5)), 1: indices(*range(5))}, (10, 10))
    assert cost.dense / cost.sparse(half) == cost.ceiling(half.density)


def test_the_ceiling_with_some_layers_dense() -> None:
    # Llama-3.1-8B: 5.64 of 7.5 billion weights are MLP; 21 of 32 layers keep 0.4 -> at most 1.42
    size, sparse = 1000, range(6, 27)
    cost = ReadCost(
        shared=round((7.5 - 5.64) / 5.64 * 32 * size),
        per_neuron=(1,) * 32,
        num_neurons=(size,) * 32,
    )
    core_set = CoreSet({layer: indices(*range(400)) for layer in sparse}, (size,) * 32)
    assert round(cost.dense / cost.sparse(core_set), 2) == 1.42
