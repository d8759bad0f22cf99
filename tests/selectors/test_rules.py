"""Every rule, against its formula written out neuron by neuron."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.core.coreset import CoreSet
from coreinfer.errors import UserError
from coreinfer.selectors import (
    Dense,
    Evidence,
    Fixed,
    Griffin,
    Impact,
    Oracle,
    Random,
    Selection,
    Selector,
    Stability,
)
from tests.selectors.evidence import Prompt, best, prompt

SEEDS = st.integers(0, 9999)
KEEPS = st.integers(2, 20).map(lambda twentieths: twentieths / 20)
RULES = [Stability(), Impact(), Griffin(), Random()]


def chosen(selection: Selection) -> dict[int, list[int]]:
    return {layer: index.tolist() for layer, index in selection.layers.items()}


def columns(h: Tensor) -> list[list[float]]:
    """The activations of each neuron over the prompt."""
    return h.double().T.tolist()


def naive_stability(h: Tensor, alpha: float) -> list[tuple[float, ...]]:
    """(f(n), sum of positive activations), token by token."""
    counts, sums = [0] * h.shape[1], [0.0] * h.shape[1]
    for token in h.double().tolist():
        positive = [n for n, value in enumerate(token) if value > 0]
        size = max(1, math.ceil(Fraction(str(alpha)) * len(positive)))
        for n in sorted(positive, key=lambda n: (-token[n], n))[:size]:
            counts[n] += 1
        for n in positive:
            sums[n] += token[n]
    return list(zip(counts, sums, strict=True))


def naive_impact(h: Tensor, norms: Tensor) -> list[tuple[float, ...]]:
    return [
        (math.sqrt(sum(v * v for v in column)) * norm,)
        for column, norm in zip(columns(h), norms.tolist(), strict=True)
    ]


def naive_griffin(h: Tensor) -> list[tuple[float, ...]]:
    lengths = [math.sqrt(sum(v * v for v in token)) for token in h.double().tolist()]
    return [
        (math.sqrt(sum((v / n) ** 2 for v, n in zip(column, lengths, strict=True) if n)),)
        for column in columns(h)
    ]


@given(SEEDS, KEEPS, st.sampled_from([0.05, 0.2, 0.4, 1.0]), st.booleans())
def test_stability_is_the_papers_rule(seed: int, keep: float, alpha: float, coarse: bool) -> None:
    given_prompt = prompt(seed, coarse=coarse)
    selection = Stability(alpha=alpha, beta=keep).select(given_prompt.evidence(alpha))
    for layer, h in enumerate(given_prompt.h):
        expected = best(naive_stability(h, alpha), round(keep * 10))
        assert chosen(selection)[layer] == expected


@given(SEEDS, KEEPS)
def test_impact_is_l2_times_column_norm(seed: int, keep: float) -> None:
    given_prompt = prompt(seed)
    selection = Impact(beta=keep).select(given_prompt.evidence(None))
    for layer, (h, norms) in enumerate(zip(given_prompt.h, given_prompt.norms, strict=True)):
        assert chosen(selection)[layer] == best(naive_impact(h, norms), round(keep * 10))


@given(SEEDS, KEEPS)
def test_griffin_is_the_l2_of_normalised_tokens(seed: int, keep: float) -> None:
    given_prompt = prompt(seed)
    selection = Griffin(beta=keep).select(given_prompt.evidence(None))
    for layer, h in enumerate(given_prompt.h):
        assert chosen(selection)[layer] == best(naive_griffin(h), round(keep * 10))


@given(SEEDS, KEEPS)
def test_the_oracle_is_impact_on_the_tokens_that_follow(seed: int, keep: float) -> None:
    past, future = prompt(seed), prompt(seed + 1)
    future = Prompt(future.h, past.norms)
    foreseen = Oracle(beta=keep).select(past.evidence(None, future=future))
    assert chosen(foreseen) == chosen(Impact(beta=keep).select(future.evidence(None)))


def test_the_oracle_without_a_future_says_where_there_is_one() -> None:
    with pytest.raises(UserError, match=r"oracle selector needs the tokens that follow"):
        Oracle().select(prompt().evidence())


def test_random_is_the_same_for_every_prompt_and_differs_by_layer_and_seed() -> None:
    sizes = (60, 60)
    one = Random(seed=3).select(prompt(0, sizes=sizes).evidence(None))
    other = Random(seed=3).select(prompt(1, sizes=sizes).evidence(None))
    reseeded = Random(seed=4).select(prompt(0, sizes=sizes).evidence(None))
    assert chosen(one) == chosen(other)
    assert chosen(one)[0] != chosen(one)[1]
    assert chosen(one) != chosen(reseeded)


def test_random_leaves_no_trace_in_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Random(seed=7).select(prompt().evidence(None))
    assert torch.equal(torch.rand(1), expected)


def test_random_keeps_every_neuron_equally_often() -> None:
    evidence = prompt(sizes=(10,)).evidence(None)
    kept = torch.zeros(10)
    for seed in range(400):
        kept[Random(seed=seed, beta=0.4).select(evidence).layers[0].long()] += 1
    assert kept.sum() == 400 * 4
    # a binomial of 400 draws at 0.4 has a deviation of 9.8
    assert (kept - 160).abs().max() < 50


def test_random_draws_do_not_depend_on_which_layers_are_dense() -> None:
    evidence = prompt().evidence(None)
    every = chosen(Random(seed=1).select(evidence))
    some = chosen(Random(seed=1, dense_layers=(0,)).select(evidence))
    assert some == {1: every[1], 2: every[2]}


def test_dense_selects_nothing() -> None:
    assert Dense().select(prompt().evidence()).layers == {}


def test_fixed_is_the_set_it_was_given() -> None:
    index = torch.tensor([1, 4], dtype=torch.int32)
    core_set = CoreSet({1: index}, (10, 10, 10), "m", "f", {"name": "impact", "beta": 0.2})
    selector = Fixed(core_set=core_set)
    selector.check((10, 10, 10), "f", "m")
    assert chosen(selector.select(prompt().evidence())) == {1: [1, 4]}
    assert selector.describe() == {"name": "fixed", "core_set": {"name": "impact", "beta": 0.2}}
    with pytest.raises(UserError, match="made for 'm'"):
        selector.check((10, 10, 10), "g", "n")


@given(SEEDS, KEEPS, st.sampled_from(RULES), st.integers(1, 40), st.integers(0, 3))
def test_exactly_k_sorted_int32_whatever_the_prompt(
    seed: int, keep: float, rule: Selector, size: int, tokens: int
) -> None:
    budget = round(keep * size)
    if budget == 0:
        return
    evidence = prompt(seed, tokens=tokens, sizes=(size,), coarse=True).evidence(0.4)
    index = type(rule)(beta=keep).select(evidence).layers[0]
    assert index.dtype == torch.int32
    assert index.numel() == budget
    assert index.tolist() == sorted(set(index.tolist()))
    assert 0 <= int(index[0]) <= int(index[-1]) < size


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_dense_layers_and_budgets(rule: Selector) -> None:
    selector = type(rule)(beta=0.4, dense_layers=(0, 2), budgets={1: 0.7, 2: 0.1})
    selection = selector.select(prompt(sizes=(10, 10, 10, 10)).evidence(0.4))
    # layer 2 is dense, whatever its budget says
    assert {layer: index.numel() for layer, index in selection.layers.items()} == {1: 7, 3: 4}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_layers_of_different_sizes_have_their_own_k(rule: Selector) -> None:
    selection = type(rule)(beta=0.5).select(prompt(sizes=(10, 20, 4)).evidence(0.4))
    assert [index.numel() for index in selection.layers.values()] == [5, 10, 2]


@given(SEEDS, st.sampled_from([Stability(), Impact(), Griffin()]))
def test_the_order_of_the_tokens_does_not_matter(seed: int, rule: Selector) -> None:
    given_prompt = prompt(seed)
    turned = Prompt([h.flip(0) for h in given_prompt.h], given_prompt.norms)
    assert chosen(rule.select(given_prompt.evidence())) == chosen(rule.select(turned.evidence()))


@given(SEEDS)
def test_impact_and_griffin_do_not_see_signs(seed: int) -> None:
    given_prompt = prompt(seed)
    mirrored = Prompt([-h for h in given_prompt.h], given_prompt.norms)
    for rule in (Impact(), Griffin()):
        assert chosen(rule.select(given_prompt.evidence(None))) == chosen(
            rule.select(mirrored.evidence(None))
        )


@pytest.mark.parametrize("rule", [Stability(), Griffin(), Random(), Dense()])
def test_rules_that_do_not_weigh_columns_do_not_ask_for_their_norms(rule: Selector) -> None:
    def refuse(_layer: int) -> Tensor:
        pytest.fail("column norms take a pass over the weights")

    layers = prompt().evidence(0.4).layers
    rule.select(Evidence(layers=layers, column_norms=refuse))
