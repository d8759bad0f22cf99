"""Auto: the prompt's own set, the nearest cluster's, or a blend, by the prompt's stability."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.selectors import Auto, Evidence, Similarity, Stability, Static
from coreinfer.semantics.encoders import CoreEncoder, HiddenEncoder, SentenceEncoder
from tests.selectors.evidence import Prompt, best, prompt
from tests.semantics.stores import random_store

ANY = -1.0  # a min_similarity that every cluster reaches


def overlap(evidence: Evidence, keep: float, dense: set[int]) -> float:
    """Mean Jaccard overlap of the two halves' sets, by the definition."""
    assert evidence.halves is not None
    ratios = []
    for layer in set(range(3)) - dense:
        first, second = (
            set(best(list(zip(h[layer].counts.tolist(), h[layer].positive_sum.tolist(),
                              strict=True)), round(keep * 10)))
            for h in evidence.halves
        )  # fmt: skip
        ratios.append(len(first & second) / len(first | second))
    return sum(ratios) / len(ratios) if ratios else 1.0


@given(
    st.integers(0, 999),
    st.integers(1, 30),
    st.integers(1, 200),
    st.sampled_from([0.2, 0.4, 0.7]),
    st.sets(st.integers(0, 2), max_size=2),
)
def test_a_blend_is_the_prompts_counts_and_lambda_times_the_clusters(
    seed: int, tokens: int, prior: int, beta: float, dense: set[int]
) -> None:
    store = random_store(seed, core=True)
    evidence = prompt(seed, tokens=tokens).evidence()
    selector = Auto(
        clusters=store,
        beta=beta,
        prior_tokens=prior,
        min_similarity=ANY,
        dense_layers=tuple(dense),
    )
    selection = selector.select(evidence)
    near = store.nearest(evidence).cluster
    stability = 0.0 if tokens == 1 else overlap(evidence, beta, dense)
    weight = (1 - stability) * prior / int(store.tokens[near])
    assert selection.notes["stability"] == pytest.approx(stability)
    assert selection.notes["lambda"] == pytest.approx(weight)
    assert selection.notes["guided_by"] == "blend"
    assert selection.notes["cluster"] == near
    weight = selection.notes["lambda"]
    for layer in set(range(3)) - dense:
        own = evidence.layers[layer]
        counts = own.counts + weight * store.counts[layer][near].double()
        sums = own.positive_sum + weight * store.positive_sums[layer][near]
        scores = list(zip(counts.tolist(), sums.tolist(), strict=True))
        assert selection.layers[layer].tolist() == best(scores, round(beta * 10))


def stable(tokens: int = 8) -> Prompt:
    """A prompt whose every token has the same activations."""
    one = prompt(0, tokens=1)
    return Prompt([h.repeat(tokens, 1) for h in one.h], one.norms)


def sets_of(selector: Any, evidence: Evidence) -> list[list[int]]:
    return [index.tolist() for index in selector.select(evidence).layers.values()]


def test_a_wholly_stable_prompt_takes_nothing_from_a_cluster() -> None:
    evidence = stable().evidence()
    auto = Auto(clusters=random_store(core=True), min_similarity=ANY, prior_tokens=10**6)
    notes = auto.select(evidence).notes
    assert (notes["stability"], notes["lambda"]) == (1.0, 0.0)
    assert sets_of(auto, evidence) == sets_of(Stability(), evidence)


def test_a_short_unstable_prompt_is_guided_by_the_cluster() -> None:
    store, evidence = random_store(core=True), prompt(tokens=1).evidence()
    auto = Auto(clusters=store, min_similarity=ANY, prior_tokens=10**9)
    assert sets_of(auto, evidence) == sets_of(Similarity(clusters=store), evidence)


def test_a_long_prompt_outweighs_the_cluster() -> None:
    store, evidence = random_store(core=True), prompt(tokens=400).evidence()
    auto = Auto(clusters=store, min_similarity=ANY, prior_tokens=1)
    notes = auto.select(evidence).notes
    assert 0 < notes["lambda"] * int(store.tokens[notes["cluster"]]) < 1
    assert sets_of(auto, evidence) == sets_of(Stability(), evidence)


@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
def test_choice_trusts_a_prompt_that_is_long_and_stable(
    seed: int, tokens: int, prior: int, min_stability: float
) -> None:
    store, evidence = random_store(seed, core=True), prompt(seed, tokens=tokens).evidence()
    auto = Auto(
        clusters=store,
        mode="choice",
        prior_tokens=prior,
        min_stability=min_stability,
        min_similarity=ANY,
    )
    notes = auto.select(evidence).notes
    stability = 0.0 if tokens == 1 else overlap(evidence, 0.4, set())
    trusted = tokens >= prior and stability >= min_stability
    assert notes["guided_by"] == ("prompt" if trusted else "cluster")
    other = Stability() if trusted else Similarity(clusters=store)
    assert sets_of(auto, evidence) == sets_of(other, evidence)


@pytest.mark.parametrize("margin", [-1e-4, 1e-4])
def test_where_no_cluster_is_near_the_whole_corpus_is_the_prior(margin: float) -> None:
    store, evidence = random_store(core=True), prompt(tokens=3).evidence()
    similarity = store.nearest(evidence).similarity
    choice = Auto(clusters=store, mode="choice", min_similarity=similarity + margin)
    notes = choice.select(evidence).notes
    assert notes["similarity"] == pytest.approx(similarity, abs=1e-6)
    blend = replace(choice, mode="blend")
    if margin < 0:
        assert notes["guided_by"] == blend.select(evidence).notes["prior"] == "cluster"
        assert "why" not in notes
        assert sets_of(choice, evidence) == sets_of(Similarity(clusters=store), evidence)
    else:
        assert notes["guided_by"] == blend.select(evidence).notes["prior"] == "corpus"
        assert notes["why"] == "no cluster is near"
        assert sets_of(choice, evidence) == sets_of(Static(clusters=store), evidence)
        # A prior of many tokens against three of the prompt: its set, but for ties.
        heavy = replace(blend, prior_tokens=10**9)
        assert sets_of(heavy, evidence) == sets_of(Static(clusters=store), evidence)


@pytest.mark.parametrize("encoder", [SentenceEncoder(), HiddenEncoder(1), CoreEncoder(1)])
def test_what_is_near_is_the_encoders_to_say_unless_the_user_does(encoder: Any) -> None:
    auto = Auto(clusters=random_store(encoder=encoder))
    assert auto.nearness == encoder.min_similarity
    assert replace(auto, min_similarity=0.0).nearness == 0.0


def test_the_prompt_is_counted_as_the_clusters_were() -> None:
    assert Auto(clusters=random_store(alpha=0.25)).counting_alpha == 0.25
    assert Auto.needs_counts
    assert Auto.needs_halves


def test_a_prompt_without_halves_is_not_stable() -> None:
    auto = Auto(clusters=random_store())
    assert auto.stability(replace(prompt().evidence(), halves=None)) == 0.0
    assert auto.stability(prompt(tokens=1).evidence()) == 0.0


def test_a_prompt_of_an_all_dense_model_is_stable() -> None:
    auto = Auto(clusters=random_store(), dense_layers=(0, 1, 2))
    assert auto.stability(prompt().evidence()) == 1.0
    assert auto.select(prompt().evidence()).layers == {}


def test_every_layer_has_its_own_budget() -> None:
    auto = Auto(clusters=random_store(core=True), budgets={0: 0.9}, min_similarity=ANY)
    evidence = prompt(tokens=20).evidence()
    assert [len(one) for one in sets_of(auto, evidence)] == [9, 4, 4]
    assert evidence.halves is not None
    assert torch.is_tensor(evidence.halves[0][0].counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mix"}, "auto's mode must be one of blend, choice, got 'mix'"),
        ({"prior_tokens": 0}, "prior_tokens must be at least 1"),
        ({"prior_tokens": 1.5}, "prior_tokens must be a whole number"),
        ({"min_stability": 1.1}, "min_stability must be 0 to 1"),
        ({"min_similarity": 1.1}, "min_similarity must be a number from -1 to 1, got 1.1"),
        ({"min_similarity": float("nan")}, "min_similarity must be a number from -1 to 1"),
        ({"min_similarity": "near"}, "min_similarity must be a number from -1 to 1, got 'near'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Auto(clusters=random_store(), **options)


def test_another_models_store_is_refused() -> None:
    with pytest.raises(UserError, match="made for 'tiny'"):
        Auto(clusters=random_store()).check((10, 10, 10), "0" * 64, "other")
