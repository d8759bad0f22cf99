"""The linear stand-in, against dense solutions in the d x d form and by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.standins import DenseDown, LayerSample, Linear, Mean, StandInTerms

D, HIDDEN = 14, 6
DROPPED = torch.tensor([0, 3, 4, 7, 8, 9, 13])


def problem(tokens: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x [S, d], activations h [S, D] that partly follow from them, and W_down [d, D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = scale * (normal(tokens, HIDDEN) @ normal(HIDDEN, HIDDEN) + normal(HIDDEN))
    h = torch.relu(x @ normal(HIDDEN, D) / scale) + 0.3 * normal(tokens, D)
    return x, h, normal(HIDDEN, D)


def fit(stand_in: Linear | Mean, x: Tensor, h: Tensor, down: Tensor) -> StandInTerms:
    sample = LayerSample(capacity=max(stand_in.sample_tokens, 0))
    sample.update(x, h, torch.arange(1, x.shape[0] + 1))
    return stand_in.fit(0, sample, DenseDown(down), DROPPED)


def map_of(terms: StandInTerms) -> np.ndarray:
    """M [d, d]."""
    assert terms.left is not None
    assert terms.right is not None
    return (terms.left.double() @ terms.right.double()).numpy()


def targets(h: Tensor, down: Tensor) -> np.ndarray:
    return (h[:, DROPPED].double() @ down[:, DROPPED].double().T).numpy()


def dense_solution(x: np.ndarray, r: np.ndarray, ridge: float) -> np.ndarray:
    """The full-rank minimiser by the normal equations in d x d."""
    x, r = x - x.mean(axis=0), r - r.mean(axis=0)
    penalty = ridge * np.mean(np.sum(x * x, axis=1))
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ r).T


def objective(m: np.ndarray, x: np.ndarray, r: np.ndarray, ridge: float) -> float:
    x, r = x - x.mean(axis=0), r - r.mean(axis=0)
    penalty = ridge * np.mean(np.sum(x * x, axis=1))
    return float(np.sum((r - x @ m.T) ** 2) + penalty * np.sum(m * m))


def reduced_solution(x: np.ndarray, r: np.ndarray, ridge: float, rank: int) -> np.ndarray:
    """The best matrix of a rank, by the penalised least squares written as a plain one.

    Stacking sqrt(penalty) I under x makes the objective |R' - X' M^T|^2 with X' of full column
    rank, whose minimiser of rank k is the full one projected on the k leading right singular
    vectors of its fitted values (Eckart-Young).
    """
    x, r = x - x.mean(axis=0), r - r.mean(axis=0)
    penalty = ridge * np.mean(np.sum(x * x, axis=1))
    stacked_x = np.vstack([x, np.sqrt(penalty) * np.eye(x.shape[1])])
    stacked_r = np.vstack([r, np.zeros((x.shape[1], r.shape[1]))])
    full = np.linalg.lstsq(stacked_x, stacked_r, rcond=None)[0]
    _, _, rows = np.linalg.svd(stacked_x @ full, full_matrices=False)
    return (full @ rows[:rank].T @ rows[:rank]).T


TOKENS = st.integers(2, 20)  # fewer and more than d
RIDGES = st.sampled_from([1e-6, 1e-3, 0.3, 1.0, 100.0])
SEEDS = st.integers(0, 999)


@given(TOKENS, RIDGES, SEEDS)
def test_full_rank_is_the_solution_of_the_normal_equations(
    tokens: int, ridge: float, seed: int
) -> None:
    x, h, down = problem(tokens, seed)
    terms = fit(Linear(rank=64, ridge=ridge), x, h, down)
    expected = dense_solution(x.double().numpy(), targets(h, down), ridge)
    # with fewer tokens than d the normal equations lose digits as the ridge gets small
    np.testing.assert_allclose(map_of(terms), expected, rtol=2e-4, atol=2e-5 * abs(expected).max())


@given(TOKENS, st.integers(1, HIDDEN), RIDGES, SEEDS)
def test_reduced_rank_is_the_best_matrix_of_that_rank(
    tokens: int, rank: int, ridge: float, seed: int
) -> None:
    x, h, down = problem(tokens, seed)
    m = map_of(fit(Linear(rank=rank, ridge=ridge), x, h, down))
    x64, r = x.double().numpy(), targets(h, down)
    assert np.linalg.matrix_rank(m, tol=1e-5 * max(abs(m).max(), 1e-30)) <= rank
    best = objective(reduced_solution(x64, r, ridge, rank), x64, r, ridge)
    assert objective(m, x64, r, ridge) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_step_from_it_within_the_rank_gets_lower(rank: int) -> None:
    x, h, down = problem(12)
    terms = fit(Linear(rank=rank, ridge=0.3), x, h, down)
    assert terms.left is not None
    assert terms.right is not None
    left, right = terms.left.double().numpy(), terms.right.double().numpy()
    x64, r = x.double().numpy(), targets(h, down)
    least = objective(left @ right, x64, r, 0.3)
    random = np.random.default_rng(0)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(200):
            moved = left + size * random.normal(size=left.shape)
            turned = right + size * random.normal(size=right.shape)
            assert objective(moved @ turned, x64, r, 0.3) >= least * (1 - 1e-6)


def test_gradient_descent_from_anywhere_does_not_get_lower() -> None:
    x, h, down = problem(9, seed=4)
    x64, r = x.double(), torch.from_numpy(targets(h, down))
    least = objective(map_of(fit(Linear(rank=2), x, h, down)), x64.numpy(), r.numpy(), 0.3)
    x_centred, r_centred = x64 - x64.mean(dim=0), r - r.mean(dim=0)
    penalty = 0.3 * x_centred.square().sum(dim=1).mean()
    reached = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        left = torch.randn(HIDDEN, 2, generator=generator, dtype=torch.float64).requires_grad_()
        right = torch.randn(2, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
        search = torch.optim.LBFGS([left, right], max_iter=200, line_search_fn="strong_wolfe")

        def loss(left: Tensor = left, right: Tensor = right) -> Tensor:
            m = left @ right
            return (r_centred - x_centred @ m.T).square().sum() + penalty * m.square().sum()

        def closure() -> Tensor:
            search.zero_grad()  # noqa: B023  # called before the loop moves on
            value = loss()
            value.backward()
            return value

        search.step(closure)
        reached.append(float(loss().detach()))
    assert min(reached) == pytest.approx(least, rel=1e-4)
    assert min(reached) >= least * (1 - 1e-6)


@given(TOKENS, SEEDS)
def test_the_prompts_mean_input_gives_the_mean_of_the_dropped_part(tokens: int, seed: int) -> None:
    x, h, down = problem(tokens, seed)
    terms = fit(Linear(rank=3), x, h, down)
    assert terms.left is not None
    assert terms.right is not None
    answer = terms.offset + terms.left @ (terms.right @ x.mean(dim=0))
    expected = torch.from_numpy(targets(h, down).mean(axis=0)).float()
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_a_linear_dropped_part_is_replaced_exactly() -> None:
    x, _, down = problem(40)
    h = torch.zeros(40, D)
    h[:, DROPPED[:2]] = x[:, :2] * 3 + 1
    terms = fit(Linear(rank=2, ridge=1e-9), x, h, down)
    assert terms.left is not None
    assert terms.right is not None
    replaced = terms.offset + x @ terms.right.T @ terms.left.T
    torch.testing.assert_close(
        replaced, torch.from_numpy(targets(h, down)).float(), rtol=1e-3, atol=1e-3
    )


def test_the_order_of_the_tokens_does_not_matter() -> None:
    x, h, down = problem(15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(
        map_of(fit(Linear(rank=3), x, h, down)),
        map_of(fit(Linear(rank=3), x[order], h[order], down)),
        atol=1e-5,
    )


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_penalty_follows_the_scale_of_the_inputs(scale: float) -> None:
    x, h, down = problem(15)
    plain = map_of(fit(Linear(rank=3), x, h, down))
    scaled = map_of(fit(Linear(rank=3), x * scale, h, down))
    np.testing.assert_allclose(scaled * scale, plain, rtol=1e-3, atol=1e-5)


def test_a_shift_of_the_inputs_moves_the_offset_alone() -> None:
    x, h, down = problem(15)
    np.testing.assert_allclose(
        map_of(fit(Linear(rank=3), x, h, down)),
        map_of(fit(Linear(rank=3), x + 8, h, down)),
        atol=1e-4,
    )


def test_a_huge_ridge_is_the_mean_stand_in() -> None:
    x, h, down = problem(15)
    linear, mean = fit(Linear(ridge=1e12), x, h, down), fit(Mean(), x, h, down)
    assert abs(map_of(linear)).max() < 1e-9
    torch.testing.assert_close(linear.offset, mean.offset)


def test_ill_conditioned_inputs() -> None:
    x, h, down = problem(30)
    x = x * torch.logspace(0, -6, HIDDEN)  # a condition number of 1e6, squared in the Gram matrix
    for ridge in (1e-6, 0.3):
        m = map_of(fit(Linear(rank=64, ridge=ridge), x, h, down))
        x64, r = x.double().numpy(), targets(h, down)
        best = objective(dense_solution(x64, r, ridge), x64, r, ridge)
        assert objective(m, x64, r, ridge) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("value", [0.1, 1.0, 12345.678, 1e-20])
def test_tokens_that_do_not_differ_leave_the_mean(value: float) -> None:
    _, h, down = problem(50)
    x = torch.full((50, HIDDEN), value)
    terms = fit(Linear(), x, h, down)
    assert not map_of(terms).any()
    torch.testing.assert_close(terms.offset, fit(Mean(), x, h, down).offset)


def test_one_token_leaves_its_own_dropped_part() -> None:
    x, h, down = problem(1)
    terms = fit(Linear(), x, h, down)
    assert not map_of(terms).any()
    torch.testing.assert_close(terms.offset, down[:, DROPPED] @ h[0, DROPPED])


def test_two_tokens_give_one_direction() -> None:
    x, h, down = problem(2)
    m = map_of(fit(Linear(rank=8), x, h, down))
    np.testing.assert_allclose(
        m, dense_solution(x.double().numpy(), targets(h, down), 0.3), atol=1e-5
    )
    assert np.linalg.matrix_rank(m, tol=1e-5) == 1


@pytest.mark.parametrize(
    ("tokens", "rank", "width"), [(4, 9, 4), (30, 9, 6), (30, 2, 2), (1, 5, 1)]
)
def test_the_factors_are_as_thin_as_they_can_be(tokens: int, rank: int, width: int) -> None:
    terms = fit(Linear(rank=rank), *problem(tokens))
    assert terms.left is not None
    assert terms.right is not None
    assert terms.left.shape == (HIDDEN, width)
    assert terms.right.shape == (width, HIDDEN)
    assert terms.num_weights == HIDDEN + 2 * HIDDEN * width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_terms_have_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    x, h, down = problem(15)
    terms = fit(Linear(rank=3), x.to(dtype), h.to(dtype), down.to(dtype))
    assert terms.left is not None
    assert terms.right is not None
    assert {t.dtype for t in (terms.offset, terms.left, terms.right)} == {dtype}
    reference = map_of(fit(Linear(rank=3), x, h, down))
    np.testing.assert_allclose(map_of(terms), reference, atol=0.05 * abs(reference).max())


@pytest.mark.parametrize("tokens", [1, 2, 12])
def test_a_dropped_part_that_is_known_gives_the_same(tokens: int) -> None:
    """It is of every token, the sink too, each at its position; the sample may have some alone."""
    x, h, down = problem(tokens)
    known = torch.cat([torch.full((1, HIDDEN), 1e6), torch.from_numpy(targets(h, down)).float()])
    never = DenseDown(torch.full((HIDDEN, D), torch.nan))
    for capacity in (256, 5):
        sample = LayerSample(capacity)
        sample.update(x, h, torch.arange(1, tokens + 1))
        computed = Linear(rank=3).fit(0, sample, DenseDown(down), DROPPED)
        given_ = Linear(rank=3).fit(0, sample, never, DROPPED, known)
        torch.testing.assert_close(given_.offset, computed.offset, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(map_of(given_), map_of(computed), rtol=1e-4, atol=1e-5)
        mean = Mean().fit(0, sample, DenseDown(down), DROPPED)
        torch.testing.assert_close(Mean().fit(0, sample, never, DROPPED, known).offset, mean.offset)


def test_what_is_skipped_counts_as_what_is_dropped() -> None:
    x, h, down = problem(12)
    dropped = torch.from_numpy(targets(h, down)).float()
    skipped = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(1))
    sink = torch.zeros(1, HIDDEN)
    sample = LayerSample(256)
    sample.update(x, h, torch.arange(1, 13))
    given_ = DenseDown(down), DROPPED
    both = Linear(rank=3).fit(0, sample, *given_, torch.cat([sink, dropped + skipped]))
    for known in (None, torch.cat([sink, dropped])):
        terms = Linear(rank=3).fit(0, sample, *given_, known, skipped)
        torch.testing.assert_close(terms.offset, both.offset, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(map_of(terms), map_of(both), rtol=1e-4, atol=1e-5)


def test_what_is_skipped_of_a_sample() -> None:
    x, h, down = problem(12)
    sample = LayerSample(5)
    with pytest.raises(ValueError, match="no token"):
        sample.skipped_part(DenseDown(down), DROPPED, torch.ones(0, len(DROPPED)).bool())
    sample.update(x, h, torch.arange(1, 13))
    assert sample.h is not None
    small = torch.rand(5, len(DROPPED), generator=torch.Generator().manual_seed(1)) < 0.5
    made = sample.skipped_part(DenseDown(down), DROPPED, small)
    torch.testing.assert_close(made, (sample.h[:, DROPPED] * small) @ down[:, DROPPED].t())


@pytest.mark.parametrize("tokens", [65, 255])
@pytest.mark.parametrize("ridge", [0.1, 0.3, 30.0])
def test_a_large_sample_is_fitted_in_float32_as_well_as_in_float64(
    tokens: int, ridge: float
) -> None:
    """More inputs than tokens, of energies as uneven as a model's, around a mean far from zero."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(1, -3, 300)
    x = 5 + torch.randn(tokens, 300, generator=generator) * spread
    h = torch.relu(x @ torch.randn(300, D, generator=generator)) + torch.randn(
        tokens, D, generator=generator
    )
    down = torch.randn(300, D, generator=generator)
    x64, r = x.double().numpy(), targets(h, down)
    for rank in (3, 300):
        m = map_of(fit(Linear(rank=rank, ridge=ridge), x, h, down))
        best = objective(reduced_solution(x64, r, ridge, rank), x64, r, ridge)
        assert objective(m, x64, r, ridge) == pytest.approx(best, rel=1e-4)


def test_many_equal_tokens_leave_the_mean() -> None:
    _, h, down = problem(100)
    terms = fit(Linear(), torch.full((100, HIDDEN), 12345.678), h, down)
    assert not map_of(terms).any()
    torch.testing.assert_close(terms.offset, fit(Mean(), h, h, down).offset)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "3", None, True, math.nan])
def test_a_bad_rank_is_refused(rank: object) -> None:
    with pytest.raises(UserError, match=r"^rank must be .*at least 1, got "):
        Linear(rank=rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("ridge", [0, -0.3, math.nan, math.inf, "0.3", None, True])
def test_a_bad_ridge_is_refused(ridge: object) -> None:
    with pytest.raises(UserError, match=r"^ridge must be a finite number above 0, got "):
        Linear(ridge=ridge)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 0, -4, 2.5, "9", None, True])
def test_a_bad_sample_size_is_refused(tokens: object) -> None:
    with pytest.raises(UserError, match=r"^sample_tokens must be .*at least 2, got "):
        Linear(sample_tokens=tokens)  # type: ignore[arg-type]
