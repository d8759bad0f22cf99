"""The residual rule: by brute force, however its tokens come in, on both backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coreinfer.backends.base import Backend, Phase
from coreinfer.calibration.store import CalibrationStore
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Impact, Residual, Static
from coreinfer.standins import Calibrated
from tests.building.corpora import documents, write_corpus
from tests.calibration.stores import build, random_store
from tests.native.pairs import tiny_pair
from tests.tiny import BOS, tiny_backend

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]


def store_for(backend: Backend, folder: Path) -> CalibrationStore:
    return build(backend, write_corpus(folder / "c.jsonl", documents(12)), folder / "s")


def test_it_keeps_what_the_prediction_cannot_replace(tmp_path: Path) -> None:
    backend = tiny_backend()
    store = store_for(backend, tmp_path)
    rule = Residual(calibration=store, beta=0.25, prior_tokens=7)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    plan = replace(
        RecordingPlan.of(rule), observer=lambda layer, x, h: seen.update({layer: (x, h)})
    )
    session = backend.start(plan)
    session.prefill([[BOS, *A]])
    chosen = session.select(rule)[0].core_set.layers
    for layer, (x, h) in seen.items():
        made, prior = store.predictions[layer], store.statistics[layer]
        assert prior.residual_sum is not None
        scores = []
        weight = backend.anatomy.layers[layer].output.weight
        for n in range(48):
            total = 7 * float(prior.residual_sum[n]) / prior.tokens
            for t in range(len(x)):
                z = (x[t] - made.input_mean) @ made.basis
                predicted = float(made.coefficients[0, n] + z @ made.coefficients[1:, n])
                total += (float(h[t, n]) - predicted) ** 2
            scores.append(total**0.5 * float(weight[:, n].norm()))
        best = sorted(range(48), key=lambda n: -scores[n])[:12]
        assert chosen[layer].tolist() == sorted(best)


def residual_sums(session: Any) -> list[list[torch.Tensor]]:
    return [[layer.residual_sum for layer in one.layers] for one in session.evidence()]


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_and_batches_do_not_matter(tmp_path: Path, chunk: int) -> None:
    store = store_for(tiny_backend(), tmp_path)
    plan = replace(RecordingPlan.of(Residual(calibration=store)), halves=True)
    together = tiny_backend(prefill_chunk=chunk).start(plan)
    together.prefill([[BOS, *A], B])
    for row, tokens in enumerate([[BOS, *A], B]):
        alone = tiny_backend().start(plan)
        alone.prefill([tokens])
        for one, two in zip(residual_sums(alone)[0], residual_sums(together)[row], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
        halves = together.evidence()[row].halves
        assert halves is not None
        for first, second, whole in zip(*halves, residual_sums(together)[row], strict=True):
            torch.testing.assert_close(first.residual_sum + second.residual_sum, whole)


def test_turns_add_and_forks_do_not_touch(tmp_path: Path) -> None:
    backend = tiny_backend()
    store = store_for(backend, tmp_path)
    plan = RecordingPlan.of(Residual(calibration=store))
    session = backend.start(plan)
    session.prefill([A])
    before = residual_sums(session)[0]
    fork = session.fork()
    fork.prefill([B])
    for one, two, more in zip(
        before, residual_sums(session)[0], residual_sums(fork)[0], strict=True
    ):
        assert torch.equal(one, two)
        assert (more >= one).all()
        assert more.sum() > one.sum()


def test_nothing_is_computed_where_it_is_not_asked_for() -> None:
    session = tiny_backend().start(RecordingPlan.of(Impact()))
    session.prefill([A])
    assert all(layer.residual_sum is None for layer in session.evidence()[0].layers)
    rule = Residual(calibration=random_store(sizes=(48,) * 3, hidden=32), beta=0.5)
    rule = replace(
        rule, calibration=replace(rule.calibration, model_fingerprint=tiny_backend().fingerprint)
    )
    with pytest.raises(ValueError, match="the prefill recorded"):
        session.select(rule)


def sets(choices: Sequence[Any]) -> list[dict[int, list[int]]]:
    return [{i: t.tolist() for i, t in choice.core_set.layers.items()} for choice in choices]


@pytest.mark.parametrize("variant", ["llama", "qwen3", "opt", "relu"])
def test_both_backends_choose_and_decode_alike(tmp_path: Path, variant: str) -> None:
    pair = tiny_pair(variant)
    store = store_for(pair.hf, tmp_path)
    rule = Residual(calibration=store, beta=0.4)
    stand_in = Calibrated(calibration=store, rank=5)
    logits, chosen, costs = [], [], []
    for backend in (pair.hf, pair.native):
        backend.check(rule, stand_in)
        session = backend.start(RecordingPlan.of(rule, stand_in))
        session.prefill([[BOS, *A], B])
        choices = session.select(rule, stand_in)
        chosen.append(sets(choices))
        costs.append([choice.stand_in_bytes for choice in choices])
        logits.append(session.decode([[7, 8], [9, 10]], Phase.SCORE))
    assert chosen[0] == chosen[1]
    assert all(cost > 0 for row in costs for cost in row)
    # the native stand-in's maps are int8
    torch.testing.assert_close(logits[0], logits[1], rtol=0.05, atol=0.05)


def test_keeping_all_is_dense(tmp_path: Path) -> None:
    backend = tiny_backend()
    store = store_for(backend, tmp_path)
    rule, stand_in = Residual(calibration=store, beta=1.0), Calibrated(calibration=store)
    session = backend.start(RecordingPlan.of(rule, stand_in))
    session.prefill([A])
    dense = session.fork().decode([[3, 4]])
    (choice,) = session.select(rule, stand_in)
    assert choice.core_set.density == 1
    assert torch.equal(session.decode([[3, 4]]), dense)


def test_static_takes_the_counts_of_a_calibration(tmp_path: Path) -> None:
    backend = tiny_backend()
    store = store_for(backend, tmp_path)
    rule = Static(clusters=store, beta=0.25)
    backend.check(rule)
    session = backend.start(RecordingPlan.of(rule))
    session.prefill([A])
    chosen = session.select(rule)[0].core_set.layers
    for layer, index in chosen.items():
        counts = store.statistics[layer].counts
        assert counts[index.long()].min() >= counts[counts.topk(12).indices].min()


def test_another_model_is_refused_by_name() -> None:
    store = random_store(sizes=(48,) * 3, hidden=32)
    backend = tiny_backend()
    with pytest.raises(UserError, match="calibration store was made for 'tiny'"):
        backend.check(Residual(calibration=store))
    with pytest.raises(UserError, match="calibration store was made for 'tiny'"):
        backend.check(Impact(), Calibrated(calibration=store))
    with pytest.raises(UserError, match="prior_tokens"):
        Residual(calibration=store, prior_tokens=-1)
