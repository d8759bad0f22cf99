"""Training a store's predictions on what decoding loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from coreinfer.backends.hf.session import HfBackend
from coreinfer.building.training import gradients, train
from coreinfer.calibration.store import CalibrationStore
from coreinfer.errors import UserError
from coreinfer.selectors import Residual
from coreinfer.standins import Calibrated
from tests.building.corpora import documents, write_corpus
from tests.calibration.stores import build
from tests.tiny import tiny_backend

TEXTS = documents(8)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def backend(request: pytest.FixtureRequest) -> HfBackend:
    return tiny_backend(request.param)


@pytest.fixture(scope="module")
def store(backend: HfBackend, tmp_path_factory: pytest.TempPathFactory) -> CalibrationStore:
    folder = tmp_path_factory.mktemp("training")
    return build(backend, write_corpus(folder / "c.jsonl", TEXTS), folder / "store")


def ids_of(backend: HfBackend) -> list[list[int]]:
    return [list(backend.tokenizer(text).input_ids)[:90] for text in TEXTS]


def loss_of(backend: HfBackend, store: CalibrationStore, batch: Sequence[Sequence[int]]) -> float:
    rule = Residual(calibration=store, beta=0.4)
    # All directions, so that nothing but the coefficients decides.
    return gradients(backend, rule, Calibrated(calibration=store, rank=32), batch)[0]


def changed(store: CalibrationStore, layer: int, by: Tensor) -> CalibrationStore:
    made = list(store.predictions)
    made[layer] = replace(made[layer], coefficients=made[layer].coefficients + by)
    return replace(store, predictions=made)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gradients_are_what_the_loss_changes_by(
    backend: HfBackend, store: CalibrationStore, layer: int
) -> None:
    batch = [ids[:size] for ids, size in zip(ids_of(backend), (90, 84), strict=False)]
    rule = Residual(calibration=store, beta=0.4)
    _, found = gradients(backend, rule, Calibrated(calibration=store, rank=32), batch)
    gradient = found[layer]
    assert not gradient[0].any()  # the mean is the prompt's own
    direction = gradient / gradient.norm()
    size = 0.02 * store.predictions[layer].coefficients[1:].norm()
    ends = [loss_of(backend, changed(store, layer, s * size * direction), batch) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * float(size))
    assert slope == pytest.approx(float(gradient.norm()), rel=0.1)


def test_training_loses_less_and_leaves_the_rest(
    backend: HfBackend, store: CalibrationStore
) -> None:
    before = [one.coefficients.clone() for one in store.predictions]
    trained = train(backend, store, lambda: iter(ids_of(backend)), 40, seed=0, progress=False)
    for one, old in zip(store.predictions, before, strict=True):
        assert torch.equal(one.coefficients, old)
    for one, old in zip(trained.predictions, store.predictions, strict=True):
        assert torch.equal(one.coefficients[0], old.coefficients[0])
        assert torch.equal(one.basis, old.basis)
    batch = ids_of(backend)[:4]
    assert loss_of(backend, trained, batch) < 0.99 * loss_of(backend, store, batch)


def test_it_goes_on_where_it_was_cut_off(backend: HfBackend, store: CalibrationStore) -> None:
    def read() -> Iterator[Sequence[int]]:
        return iter(ids_of(backend))

    whole = train(backend, store, read, 6, seed=3, progress=False)
    left: dict[str, Tensor] = {}

    def keep(step: int, tensors: Mapping[str, Tensor]) -> None:
        if step == 4:
            left.update({name: tensor.clone() for name, tensor in tensors.items()})

    train(backend, store, read, 6, seed=3, keep=keep, progress=False)
    rest = train(backend, store, read, 6, seed=3, done=4, tensors=left, progress=False)
    for a, b in zip(whole.predictions, rest.predictions, strict=True):
        assert torch.equal(a.coefficients, b.coefficients)


def test_documents_that_are_too_short(backend: HfBackend, store: CalibrationStore) -> None:
    with pytest.raises(UserError, match="no document has the 8 tokens"):
        train(backend, store, lambda: iter([[1, 2, 3]]), 1, seed=0, progress=False)


@pytest.mark.parametrize("broken", ["loss", "gradients"])
def test_training_that_runs_away_ends_at_once(
    backend: HfBackend, store: CalibrationStore, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    kept: list[int] = []

    def keep(step: int, _tensors: Mapping[str, Tensor]) -> None:
        kept.append(step)

    def third_is_broken(*given: Any) -> tuple[float, list[Tensor]]:
        loss, found = gradients(*given)
        if len(kept) < 2:
            return loss, found
        if broken == "loss":
            return float("nan"), found
        return loss, [one * float("inf") for one in found]

    monkeypatch.setattr("coreinfer.building.training.gradients", third_is_broken)
    with pytest.raises(UserError, match=r"training ran away: KL .* at step 3 of 40"):
        train(backend, store, lambda: iter(ids_of(backend)), 40, 0, keep=keep, progress=False)
    assert kept == [1, 2]
