"""The sums of a calibration, against least squares and singular values on all tokens at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.calibration.sums import BasisSums, PredictionSums, sketch_of
from coreinfer.core.statistics import LayerStatistics

HIDDEN, NEURONS = 6, 15


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, d] and h [T, D], which partly follows from x, and column norms [D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(count, HIDDEN) @ normal(HIDDEN, HIDDEN) + normal(HIDDEN)
    h = torch.relu(x @ normal(HIDDEN, NEURONS)) + 0.3 * normal(count, NEURONS)
    return x, h, torch.rand(NEURONS, generator=generator) + 0.1


def basis_of(
    x: Tensor, h: Tensor, norms: Tensor, rank: int, parts: int = 1, sketch: Tensor | None = None
) -> BasisSums:
    if sketch is None:
        sketch = sketch_of(NEURONS, rank, torch.Generator().manual_seed(3))
    sums = BasisSums.zeros(sketch, norms, HIDDEN)
    for some, their in zip(x.chunk(parts), h.chunk(parts), strict=True):
        sums.add(some, their)
    return sums


def prediction_of(
    x: Tensor, h: Tensor, basis: tuple[Tensor, Tensor], parts: int = 1
) -> tuple[PredictionSums, LayerStatistics]:
    sums, stats = PredictionSums.zeros(*basis, NEURONS), LayerStatistics.zeros(NEURONS, HIDDEN)
    for some, their in zip(x.chunk(parts), h.chunk(parts), strict=True):
        sums.add(some, their)
        stats.update(some, their, None)
    return sums, stats


@pytest.mark.parametrize("exact", [True, False])
@given(rank=st.integers(1, HIDDEN), seed=st.integers(0, 99))
def test_the_basis_is_that_of_reduced_rank_regression(exact: bool, rank: int, seed: int) -> None:
    x, h, norms = tokens(400, seed)
    # So few neurons are sketched exactly; many random directions are nearly as good.
    generator = torch.Generator().manual_seed(3)
    sketch = None if exact else torch.randn(NEURONS, 400, generator=generator)
    _, basis = basis_of(x, h, norms, rank, sketch=sketch).basis(rank)
    centred, targets = x.double() - x.double().mean(0), (h - h.mean(0)).double() * norms
    # By the definition: the best prediction of rank r is the full one, projected on the leading
    # right singular vectors of its fitted values (Eckart-Young).
    full = np.linalg.lstsq(centred.numpy(), targets.numpy(), rcond=None)[0]
    fitted = centred.numpy() @ full
    _, _, rows = np.linalg.svd(fitted, full_matrices=False)
    best = np.sum((targets.numpy() - fitted @ rows[:rank].T @ rows[:rank]) ** 2)
    z = centred.numpy() @ basis.double().numpy()
    ours = targets.numpy() - z @ np.linalg.lstsq(z, targets.numpy(), rcond=None)[0]
    assert np.sum(ours**2) <= best * (1.01 if exact else 1.1)  # the ridge and the sketch apart


@given(rank=st.integers(1, HIDDEN), seed=st.integers(0, 99))
def test_the_basis_of_the_inputs_is_that_of_their_principal_components(
    rank: int, seed: int
) -> None:
    x, h, norms = tokens(400, seed)
    mean, basis = basis_of(x, h, norms, rank).basis(rank, "inputs")
    assert basis.shape == (HIDDEN, rank)
    centred = x.double().numpy() - mean.double().numpy()
    z = centred @ basis.double().numpy()
    white = np.atleast_2d(np.cov(z.T, bias=True))
    assert np.all(np.diag(white) <= 1 + 1e-6)  # less by the ridge, where x hardly differs
    assert np.allclose(white, np.diag(np.diag(white)), atol=1e-4)
    values, vectors = np.linalg.eigh(np.cov(centred.T, bias=True))
    share = values[-rank:] / (values[-rank:] + 1e-3 * values.mean())
    assert np.allclose(np.diag(white), share, rtol=1e-3)
    kept = np.linalg.qr(basis.double().numpy())[0]
    leading = vectors[:, -rank:]
    assert np.allclose(kept @ kept.T, leading @ leading.T, atol=1e-3)


@given(st.integers(1, 4), st.integers(0, 99))
def test_the_prediction_is_least_squares_on_the_basis(rank: int, seed: int) -> None:
    x, h, norms = tokens(500, seed)
    sums, stats = prediction_of(x, h, basis_of(x, h, norms, rank).basis(rank))
    made, residual_sum = sums.prediction(stats)
    z = made.features(x)
    np.testing.assert_allclose(z[:, 1:].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(z[:, 1:].T @ z[:, 1:] / len(z), np.eye(rank), atol=2e-4)
    expected = np.linalg.lstsq(z.double().numpy(), h.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(made.coefficients.numpy(), expected, rtol=0.02, atol=0.02)
    left = h.double().numpy() - z.double().numpy() @ made.coefficients.double().numpy()
    np.testing.assert_allclose(residual_sum.numpy(), np.sum(left**2, axis=0), rtol=1e-4)
    np.testing.assert_allclose(made.residual(x, h).numpy(), left, atol=1e-4)


@given(st.integers(1, HIDDEN), st.integers(0, 99), st.sampled_from([3, 400]))
def test_what_other_coefficients_leave_follows_from_the_sums(
    rank: int, seed: int, count: int
) -> None:
    x, h, norms = tokens(count, seed)  # of few tokens, not all directions are real
    sums, stats = prediction_of(x, h, basis_of(x, h, norms, rank).basis(rank))
    made, residual_sum = sums.prediction(stats)
    torch.testing.assert_close(
        sums.residual_sum(made.coefficients, stats), residual_sum, rtol=1e-4, atol=1e-4
    )
    change = 0.3 * torch.randn(
        made.coefficients.shape, generator=torch.Generator().manual_seed(seed)
    )
    change[1:] *= made.basis.any(dim=0).unsqueeze(1)
    other = replace(made, coefficients=made.coefficients + change)
    left = other.residual(x, h).double().square().sum(dim=0)
    torch.testing.assert_close(
        sums.residual_sum(other.coefficients, stats), left, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("parts", [2, 7, 40])
def test_chunks_add_to_the_whole(parts: int) -> None:
    x, h, norms = tokens(40)
    whole, chunked = basis_of(x, h, norms, 3), basis_of(x, h, norms, 3, parts)
    assert whole.tokens == chunked.tokens == 40
    for name in ("x", "xx", "y", "xy"):
        torch.testing.assert_close(
            getattr(whole, name), getattr(chunked, name), rtol=1e-5, atol=1e-4
        )
    basis = whole.basis(3)
    one, two = prediction_of(x, h, basis)[0], prediction_of(x, h, basis, parts)[0]
    torch.testing.assert_close(one.zz, two.zz, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.zh, two.zh, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_tokens_than_directions_give_finite_predictions(count: int) -> None:
    x, h, norms = tokens(count)
    sums, stats = prediction_of(x, h, basis_of(x, h, norms, 5).basis(5))
    made, residual_sum = sums.prediction(stats)
    assert made.coefficients.isfinite().all()
    assert made.basis.isfinite().all()
    assert (residual_sum >= 0).all()
    torch.testing.assert_close(made.coefficients[0], h.mean(0), rtol=1e-5, atol=1e-5)


def test_inputs_that_never_differ_predict_their_mean() -> None:
    x, h, norms = tokens(1)
    x, h = x.expand(9, -1), h + torch.randn(9, NEURONS, generator=torch.Generator().manual_seed(1))
    sums, stats = prediction_of(x, h, basis_of(x, h, norms, 3).basis(3))
    made, _ = sums.prediction(stats)
    torch.testing.assert_close(made.residual(x, h), h - h.mean(0), rtol=1e-3, atol=1e-3)
