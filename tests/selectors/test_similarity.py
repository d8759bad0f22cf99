"""Similarity-guided selection: the top round(gamma * D) of the nearest cluster's counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.selectors import Similarity
from coreinfer.semantics.encoders import SentenceEncoder
from tests.selectors.evidence import best, prompt
from tests.semantics.stores import random_store


@given(
    st.integers(0, 999), st.floats(0.06, 1.0), st.integers(1, 5), st.sets(st.integers(0, 2)),
)  # fmt: skip
def test_it_keeps_the_top_of_the_nearest_clusters_counts(
    seed: int, gamma: float, k: int, dense: set[int]
) -> None:
    store = random_store(seed, k=k, core=True)
    evidence = prompt(seed).evidence()
    selection = Similarity(clusters=store, gamma=gamma, dense_layers=tuple(dense)).select(evidence)

    vector = (evidence.layers[1].counts / evidence.tokens).double()
    cosine = [float(vector @ c.double() / vector.norm()) for c in store.centroids]
    cluster = cosine.index(max(cosine))
    assert selection.notes["cluster"] == cluster
    assert selection.notes["similarity"] == pytest.approx(max(cosine), abs=1e-5)
    assert set(selection.layers) == {0, 1, 2} - dense
    for layer, chosen in selection.layers.items():
        scores = list(
            zip(
                store.counts[layer][cluster].tolist(),
                store.positive_sums[layer][cluster].tolist(),
                strict=True,
            )
        )
        assert chosen.tolist() == best(scores, round(gamma * 10))


def test_gamma_is_chosen_at_run_time_and_sets_nest() -> None:
    store, evidence = random_store(), prompt().evidence()
    kept = [
        set(Similarity(clusters=store, gamma=gamma).select(evidence).layers[0].tolist())
        for gamma in (0.2, 0.5, 1.0)
    ]
    assert [len(one) for one in kept] == [2, 5, 10]
    assert kept[0] < kept[1] < kept[2]


def test_gamma_and_not_beta_says_how_much_is_kept() -> None:
    selector = Similarity(clusters=random_store(), gamma=0.3, beta=0.9, budgets={2: 0.7})
    layers = selector.select(prompt().evidence()).layers
    assert [layers[i].numel() for i in range(3)] == [3, 3, 7]


def test_the_prompts_counts_are_asked_for_only_by_an_encoder_that_reads_them() -> None:
    assert Similarity(clusters=random_store()).counting_alpha is None
    assert Similarity(clusters=random_store(core=True, alpha=0.3)).counting_alpha == 0.3
    hidden = Similarity(clusters=random_store(), gamma=0.5)
    assert hidden.select(prompt().evidence(alpha=None)).layers[0].numel() == 5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="gamma must be above 0"):
        Similarity(clusters=random_store(), gamma=0)
    selector = Similarity(clusters=random_store(), gamma=0.01)
    with pytest.raises(UserError, match="made for 'tiny'"):
        selector.check((10, 10, 10), "0" * 64, "other")
    with pytest.raises(UserError, match="rounds to none"):
        selector.check((10, 10, 10), "f" * 64, "tiny")
    text_only = random_store(encoder=SentenceEncoder())
    with pytest.raises(UserError, match="needs the prompt's text"):
        Similarity(clusters=text_only).select(prompt().evidence())


def test_the_store_is_described_with_the_selector() -> None:
    store = random_store()
    about = Similarity(clusters=store, gamma=0.25).describe()
    assert about["name"] == "similarity"
    assert about["gamma"] == 0.25
    assert about["clusters"] == store.describe()


def test_a_cluster_of_all_zero_counts_still_gives_a_whole_set() -> None:
    store = random_store(counts=[torch.zeros(3, 10, dtype=torch.int64)] * 3,
                         positive_sums=[torch.zeros(3, 10).double()] * 3)  # fmt: skip
    assert Similarity(clusters=store).select(prompt().evidence()).layers[0].tolist() == [0, 1, 2, 3]
