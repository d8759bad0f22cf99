"""The static control: one set for every prompt, from the counts of the whole corpus."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.selectors import Static
from tests.selectors.evidence import best, prompt
from tests.semantics.stores import random_store


@given(st.integers(0, 999), st.integers(1, 5), st.floats(0.06, 1.0))
def test_it_ranks_by_the_sum_of_all_clusters(seed: int, k: int, beta: float) -> None:
    store = random_store(seed, k=k)
    layers = Static(clusters=store, beta=beta).select(prompt(seed).evidence(None)).layers
    for layer in range(3):
        counts = [sum(row[n] for row in store.counts[layer].tolist()) for n in range(10)]
        sums = store.positive_sums[layer].sum(dim=0).tolist()
        scores = list(zip(counts, sums, strict=True))
        assert layers[layer].tolist() == best(scores, round(beta * 10))


def test_the_prompt_makes_no_difference() -> None:
    selector = Static(clusters=random_store())
    sets = [selector.select(prompt(seed).evidence(None)).layers for seed in range(3)]
    for other in sets[1:]:
        assert all(other[i].tolist() == sets[0][i].tolist() for i in range(3))
    assert selector.counting_alpha is None


def test_another_models_store_is_refused() -> None:
    with pytest.raises(UserError, match="made for 'tiny'"):
        Static(clusters=random_store()).check((10, 10, 10), "0" * 64, "other")
