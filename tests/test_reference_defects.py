"""What the method's reference code gets wrong, each as a statement of what must be true.

Parts that cluster a corpus or run a model have theirs beside their own tests.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import coreinfer.core
import coreinfer.selectors
import coreinfer.standins
from coreinfer.core import CoreSet, LayerStatistics, token_core_mask, top_neurons
from coreinfer.errors import UserError
from coreinfer.recording import PromptRecorder, RecordingPlan, Window
from coreinfer.selectors import (
    SELECTORS,
    Auto,
    Evidence,
    Griffin,
    Impact,
    Selector,
    Similarity,
    Stability,
)
from tests.selectors.evidence import prompt, statistics

RULES = [Stability, Impact, Griffin]


def evidence_of(h: list[Tensor], alpha: float = 0.4) -> Evidence:
    return Evidence(
        layers=statistics(h, alpha),
        column_norms=lambda layer: torch.ones(h[layer].shape[1], dtype=torch.float64),
    )


def as_core_set(selector: Selector, evidence: Evidence) -> CoreSet:
    sizes = tuple(stats.num_neurons for stats in evidence.layers)
    return CoreSet(selector.select(evidence).layers, sizes)


# The reference's "sparsity 0.4" keeps 40 %, and its default keeps nothing.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", [0.1, 0.4, 0.9, 1.0])
def test_the_keep_ratio_is_what_is_kept(rule: type[Selector], keep: float) -> None:
    evidence = prompt(sizes=(100, 50)).evidence()
    core_set = as_core_set(rule(beta=keep), evidence)
    assert [core_set.kept(layer) for layer in range(2)] == [round(keep * 100), round(keep * 50)]
    assert core_set.density == pytest.approx(keep)


@pytest.mark.parametrize("rule", RULES)
def test_a_greater_ratio_keeps_more_and_drops_none_of_the_smaller(rule: type[Selector]) -> None:
    evidence = prompt(sizes=(40,)).evidence()
    kept = [set(rule(beta=b).select(evidence).layers[0].tolist()) for b in (0.2, 0.5, 0.8)]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize("rule", RULES)
def test_every_default_keeps_something_and_keeping_nothing_is_refused(
    rule: type[Selector],
) -> None:
    assert as_core_set(rule(), prompt().evidence()).density == pytest.approx(0.4)
    with pytest.raises(UserError, match="beta must be above 0"):
        rule(beta=0)


# The reference's layers 5 to 27 of 32 are 6 to 26, for no other model and no other start.


@settings(max_examples=40)
@given(st.data(), st.integers(1, 40))
def test_the_sparse_layers_are_all_but_the_dense_ones_for_any_model(
    data: st.DataObject, num_layers: int
) -> None:
    dense = data.draw(st.sets(st.integers(0, num_layers - 1)))
    sizes = (5,) * num_layers
    selector = Impact(beta=0.4, dense_layers=tuple(dense))
    selector.check(sizes, "f", "m")
    selection = selector.select(prompt(tokens=2, sizes=sizes).evidence(None))
    assert set(selection.layers) == set(range(num_layers)) - dense
    core_set = CoreSet(selection.layers, sizes)
    assert core_set.density == pytest.approx(1 - 0.6 * (num_layers - len(dense)) / num_layers)


def test_both_ends_of_the_dense_layers_are_dense() -> None:
    # the paper's first 6 and last 5 of 32
    selector = Impact(dense_layers=(*range(6), *range(27, 32)))
    selection = selector.select(prompt(tokens=2, sizes=(5,) * 32).evidence(None))
    assert set(selection.layers) == set(range(6, 27))
    assert len(selection.layers) == 21


@pytest.mark.parametrize("first_sparse", range(5))
def test_each_layer_has_its_own_set_wherever_the_sparse_ones_begin(first_sparse: int) -> None:
    # in layer i neuron i alone is active
    h = [torch.eye(6)[layer].repeat(3, 1) for layer in range(6)]
    for rule in RULES:
        selector = rule(beta=1 / 6, dense_layers=tuple(range(first_sparse)))
        chosen = selector.select(evidence_of(h)).layers
        assert {layer: index.tolist() for layer, index in chosen.items()} == {
            layer: [layer] for layer in range(first_sparse, 6)
        }


# The reference keeps the selection in module globals.


def observe(recorder: PromptRecorder, layer: int, h: Tensor, start: int) -> None:
    window = Window(torch.arange(h.shape[0]), start, middle=0, bos=False)
    recorder.observe(layer, window, torch.ones(h.shape[0], 4), h)


@settings(max_examples=25)
@given(st.integers(0, 999))
def test_two_requests_interleaved_are_two_requests_one_after_the_other(seed: int) -> None:
    sizes = [(10, 4), (10, 4)]
    a, b = prompt(seed, sizes=(10, 10)), prompt(seed + 1, sizes=(10, 10))
    plan = RecordingPlan(alpha=0.4)
    interleaved = [PromptRecorder(plan, sizes) for _ in range(2)]
    for start in range(7):
        for layer in range(2):
            for recorder, request in zip(interleaved, (a, b), strict=True):
                observe(recorder, layer, request.h[layer][start : start + 1], start)
    for recorder, request in zip(interleaved, (a, b), strict=True):
        evidence = Evidence(recorder.statistics(), request.norms.__getitem__)
        for rule in RULES:
            got = rule().select(evidence).layers
            alone = rule().select(request.evidence()).layers
            assert all(torch.equal(got[layer], alone[layer]) for layer in range(2))


def test_models_of_different_sizes_do_not_meet() -> None:
    small, large = prompt(0, sizes=(4,)), prompt(1, sizes=(40, 30, 20))
    selector = Stability()
    before = selector.select(small.evidence()).layers
    selector.select(large.evidence())
    after = selector.select(small.evidence()).layers
    assert before.keys() == after.keys()
    assert torch.equal(before[0], after[0])


def modules() -> list[str]:
    found = ["coreinfer.recording"]
    for package in (coreinfer.core, coreinfer.selectors, coreinfer.standins):
        names = (module.name for module in pkgutil.iter_modules(package.__path__))
        found += [package.__name__, *(f"{package.__name__}.{name}" for name in names)]
    return found


@pytest.mark.parametrize("name", modules())
def test_no_module_of_the_method_holds_anything_that_can_change(name: str) -> None:
    values = vars(importlib.import_module(name))
    mutable = {
        key
        for key, value in values.items()
        if isinstance(value, (list, dict, set, bytearray, Tensor)) and not key.startswith("__")
    }
    assert not mutable


# The reference takes one average limit for all tokens: int(alpha * positives / tokens).


def test_alpha_is_of_each_tokens_own_positives() -> None:
    busy, quiet = torch.arange(1.0, 11.0), torch.full((10,), -1.0)
    quiet[3] = 0.5
    h = torch.stack([busy, quiet])
    # ceil(0.4 * 10) = 4 and ceil(0.4 * 1) = 1; the average would give each int(0.4 * 11 / 2) = 2
    assert token_core_mask(h, 0.4).sum(dim=1).tolist() == [4, 1]
    assert token_core_mask(h, 0.4)[1].nonzero().flatten().tolist() == [3]


def test_a_tokens_core_neurons_do_not_depend_on_the_other_tokens() -> None:
    h = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    together = token_core_mask(h, 0.4)
    for token in range(6):
        assert torch.equal(token_core_mask(h[token : token + 1], 0.4)[0], together[token])


def test_no_token_is_without_a_voice_however_small_alpha() -> None:
    h = torch.rand(5, 30, generator=torch.Generator().manual_seed(0)) + 0.1
    assert token_core_mask(h, 0.001).sum(dim=1).tolist() == [1] * 5


def test_alpha_has_one_default_for_both_guidances() -> None:
    # the reference: 0.2 where stability guides, 0.4 where similarity does
    alphas = [
        (kind.name, f) for kind in SELECTORS.values() for f in fields(kind) if f.name == "alpha"
    ]
    assert [(name, f.default) for name, f in alphas] == [("stability", 0.4)]
    # the guidances with clusters count a prompt by the alpha that the clusters were counted by
    store: Any = SimpleNamespace(alpha=0.25, encoder=SimpleNamespace(needs_counts=True))
    assert Similarity(clusters=store).counting_alpha == 0.25
    assert Auto(clusters=store).counting_alpha == 0.25


# The reference's set is smaller than asked for when few neurons were ever counted.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("active", [0, 1, 3])
def test_exactly_k_even_where_fewer_neurons_were_ever_active(
    rule: type[Selector], active: int
) -> None:
    h = torch.zeros(1, 20)
    h[0, 20 - active :] = torch.arange(1.0, active + 1)
    core_set = as_core_set(rule(beta=0.4), evidence_of([h]))
    assert core_set.kept(0) == 8
    assert core_set.density == 0.4
    # the active ones first, then the smallest indices
    assert core_set.layers[0].tolist() == [*range(8 - active), *range(20 - active, 20)]


# The reference breaks ties of f, small whole numbers, by an unstable sort.


def test_equal_counts_go_to_the_larger_activations() -> None:
    # every neuron is counted once, in a token of its own
    sizes = torch.tensor([0.5, 3.0, 1.0, 2.0, 4.0])
    h = torch.diag(sizes)
    evidence = evidence_of([h])
    assert evidence.layers[0].counts.tolist() == [1] * 5
    chosen = Stability(beta=0.4).select(evidence).layers[0]
    assert chosen.tolist() == [1, 4]


def test_counts_come_before_activations() -> None:
    h = torch.tensor([[1.0, 100.0, 0.0], [1.0, 0.0, 0.0]])
    assert Stability(alpha=1.0, beta=1 / 3).select(evidence_of([h], 1.0)).layers[0].tolist() == [0]


def test_neurons_that_are_alike_go_by_index() -> None:
    h = torch.ones(3, 1000)
    for rule in RULES:
        chosen = rule(beta=0.4).select(evidence_of([h], 1.0)).layers[0]
        assert chosen.tolist() == list(range(400))


def test_the_last_neuron_can_be_core() -> None:
    h = torch.zeros(2, 16384)
    h[:, -1] = 1.0
    for rule in RULES:
        assert rule(beta=0.001).select(evidence_of([h])).layers[0][-1] == 16383


# Only positive activations count in the paper's rule; half of the large ones of SwiGLU are not.


@pytest.mark.parametrize("rule", [Impact, Griffin])
def test_large_negative_activations_count_in_the_sign_free_rules(rule: type[Selector]) -> None:
    h = torch.tensor([[0.1, -5.0, 0.2, -4.0, 0.3]]).repeat(4, 1)
    assert rule(beta=0.4).select(evidence_of([h])).layers[0].tolist() == [1, 3]


def test_the_papers_rule_counts_positive_activations_alone() -> None:
    h = torch.tensor([[0.1, -5.0, 0.2, -4.0, 0.3]]).repeat(4, 1)
    assert Stability(beta=0.4).select(evidence_of([h])).layers[0].tolist() == [2, 4]


# Nothing that is kept of a prompt is a matter of how it was read.


def test_reading_a_prompt_again_adds_a_second_prompt_and_changes_no_rank() -> None:
    h = prompt(3).h[0]
    once, twice = LayerStatistics.zeros(10, 4), LayerStatistics.zeros(10, 4)
    once.update(torch.zeros(7, 4), h, 0.4)
    for _ in range(2):
        twice.update(torch.zeros(7, 4), h, 0.4)
    assert twice.counts.tolist() == (2 * once.counts).tolist()
    ranked = [top_neurons((s.counts, s.positive_sum), 4) for s in (once, twice)]
    assert torch.equal(*ranked)
