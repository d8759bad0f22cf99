"""The calibrated stand-in, against its definition written with whole d x d matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.calibration.store import CalibrationStore
from coreinfer.errors import UserError
from coreinfer.standins import Calibrated, DenseDown, LayerSample, Linear, StandInTerms
from tests.calibration.stores import random_store

D, HIDDEN, RANK = 14, 6, 4
DROPPED = torch.tensor([0, 3, 4, 7, 8, 9, 13])
SEEDS = st.integers(0, 999)


def store(seed: int = 0) -> CalibrationStore:
    return random_store(seed, sizes=(D, D), hidden=HIDDEN, rank=RANK)


def problem(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x [S, d], activations h [S, D], W_down [d, D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(tokens, HIDDEN) @ normal(HIDDEN, HIDDEN) + normal(HIDDEN)
    return x, torch.relu(x @ normal(HIDDEN, D)) + 0.3 * normal(tokens, D), normal(HIDDEN, D)


def sampled(x: Tensor, h: Tensor) -> LayerSample:
    sample = LayerSample(capacity=256)
    sample.update(x, h, torch.arange(1, x.shape[0] + 1))
    return sample


def fit(stand_in: Calibrated, x: Tensor, h: Tensor, down: Tensor, layer: int = 1) -> StandInTerms:
    return stand_in.fit(layer, sampled(x, h), DenseDown(down), DROPPED)


def map_of(terms: StandInTerms) -> np.ndarray:
    assert terms.left is not None
    assert terms.right is not None
    return (terms.left.double() @ terms.right.double()).numpy()


def whole_map(
    calibration: CalibrationStore, x: Tensor, h: Tensor, down: Tensor, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """A Q^T + N by the normal equations in d x d, and A."""
    made = calibration.predictions[1]
    weight = down[:, DROPPED].double()
    a = (weight @ made.coefficients[1:, DROPPED].double().T).numpy()
    said = a @ made.basis.double().numpy().T
    x64, r = x.double().numpy(), (h[:, DROPPED].double() @ weight.T).numpy()
    x64, r = x64 - x64.mean(axis=0), r - r.mean(axis=0)
    penalty = ridge * np.mean(np.sum(x64**2, axis=1))
    left = r - x64 @ said.T
    return said + np.linalg.solve(x64.T @ x64 + penalty * np.eye(HIDDEN), x64.T @ left).T, a


def test_what_is_skipped_counts_as_what_is_dropped() -> None:
    x, h, down = problem(12)
    dropped = h[:, DROPPED] @ down[:, DROPPED].t()
    skipped = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(1))
    sample, made = sampled(x, h), Calibrated(calibration=store(), rank=3)
    both = torch.cat([torch.zeros(1, HIDDEN), dropped + skipped])
    want = made.fit(1, sample, DenseDown(down), DROPPED, both)
    terms = made.fit(1, sample, DenseDown(down), DROPPED, None, skipped)
    torch.testing.assert_close(terms.offset, want.offset, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(map_of(terms), map_of(want), rtol=1e-4, atol=1e-4)


@given(tokens=st.integers(2, 20), ridge=st.sampled_from([0.01, 0.3, 3.0, 100.0]), seed=SEEDS)
def test_full_rank_is_the_prediction_and_the_prompts_correction(
    tokens: int, ridge: float, seed: int
) -> None:
    x, h, down = problem(tokens, seed)
    calibration = store(seed)
    m, _ = whole_map(calibration, x, h, down, ridge)
    terms = fit(Calibrated(calibration=calibration, rank=99, ridge=ridge), x, h, down)
    rank = np.linalg.matrix_rank(m)
    if rank <= min(tokens + RANK, HIDDEN):
        np.testing.assert_allclose(map_of(terms), m, rtol=1e-3, atol=2e-4 * abs(m).max())
    # at the mean of the prompt's inputs it gives the mean of what was dropped
    at_mean = terms.offset.double() + torch.from_numpy(map_of(terms)) @ x.double().mean(0)
    mean = (h[:, DROPPED] @ down[:, DROPPED].t()).double().mean(0)
    torch.testing.assert_close(at_mean, mean, rtol=1e-3, atol=1e-3)


@given(tokens=st.integers(2, 20), rank=st.integers(1, HIDDEN), seed=SEEDS)
def test_the_rank_is_spent_where_it_costs_least(tokens: int, rank: int, seed: int) -> None:
    x, h, down = problem(tokens, seed)
    calibration = store(seed)
    stand_in = Calibrated(calibration=calibration, rank=rank, prior_tokens=50)
    whole, a = whole_map(calibration, x, h, down, stand_in.ridge)
    m = map_of(fit(stand_in, x, h, down))
    centred = (x - x.mean(0)).double().numpy()
    rows = np.vstack([centred @ whole.T, math.sqrt(50) * a.T])
    directions = np.linalg.svd(rows, full_matrices=False)[2][:rank]
    best = directions.T @ directions @ whole

    def lost(found: np.ndarray) -> float:
        """Of the prompt's tokens, and of what the corpus says that is in these directions."""
        kept = found @ np.linalg.pinv(whole)
        return float(np.sum((rows - rows @ kept.T) ** 2))

    assert np.linalg.matrix_rank(m, tol=1e-4 * abs(whole).max()) <= rank
    assert lost(m) <= lost(best) * 1.01 + 1e-6 * np.sum(rows**2)


def test_without_a_prediction_it_is_the_linear_one() -> None:
    x, h, down = problem(12)
    silent = store()
    made = [replace(p, coefficients=torch.zeros_like(p.coefficients)) for p in silent.predictions]
    silent = replace(silent, predictions=made)
    ours = fit(Calibrated(calibration=silent, rank=64, ridge=0.3), x, h, down)
    theirs = Linear(rank=64, ridge=0.3).fit(1, sampled(x, h), DenseDown(down), DROPPED)
    np.testing.assert_allclose(map_of(ours), map_of(theirs), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.offset, theirs.offset, rtol=1e-3, atol=1e-3)


def test_a_single_token_leaves_the_corpus_prediction() -> None:
    x, h, down = problem(1)
    calibration = store()
    terms = fit(Calibrated(calibration=calibration, rank=64), x, h, down)
    made = calibration.predictions[1]
    a = down[:, DROPPED] @ made.coefficients[1:, DROPPED].t()
    np.testing.assert_allclose(map_of(terms), (a @ made.basis.t()).numpy(), rtol=1e-3, atol=1e-4)
    given_ = terms.offset + torch.from_numpy(map_of(terms)).float() @ x[0]
    torch.testing.assert_close(given_, (down[:, DROPPED] @ h[0, DROPPED]), rtol=1e-3, atol=1e-3)


def test_each_layer_has_its_own_prediction() -> None:
    x, h, down = problem(9)
    stand_in = Calibrated(calibration=store(), rank=64)
    one, two = (fit(stand_in, x, h, down, layer) for layer in (0, 1))
    assert abs(map_of(one) - map_of(two)).max() > 0.1


def test_terms_have_the_type_of_the_weights() -> None:
    x, h, down = problem(9)
    stand_in = Calibrated(calibration=store(), rank=2)
    terms = stand_in.fit(0, sampled(x, h), DenseDown(down.bfloat16()), DROPPED)
    assert terms.left is not None
    assert terms.right is not None
    assert {terms.offset.dtype, terms.left.dtype, terms.right.dtype} == {torch.bfloat16}
    assert (terms.left.shape, terms.right.shape) == ((HIDDEN, 2), (2, HIDDEN))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"ridge": 0.0}, "ridge"),
        ({"ridge": math.inf}, "ridge"),
        ({"sample_tokens": 1}, "sample_tokens"),
        ({"prior_tokens": -1}, "prior_tokens"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Calibrated(calibration=store(), **options)  # type: ignore[arg-type]


def test_another_model_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="made for 'tiny'"):
        Calibrated(calibration=store()).check("0" * 64, "other")
    Calibrated(calibration=store()).check("f" * 64, "tiny")


def test_nothing_sampled_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        Calibrated(calibration=store()).fit(
            0, LayerSample(4), DenseDown(torch.ones(HIDDEN, D)), DROPPED
        )
