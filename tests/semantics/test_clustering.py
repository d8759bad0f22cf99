"""k-means on directions from the mean, and the number of clusters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.semantics import clustering
from coreinfer.semantics.clustering import cluster_vectors, cosines, directions, elbow


def blobs(k: int, each: int, *, seed: int = 0, size: int = 20, noise: float = 0.1) -> Tensor:
    """k groups of `each` vectors, which share one large common direction."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.linalg.qr(torch.randn(size, k, generator=generator))[0].T
    points = means.repeat(each, 1) + noise * torch.randn(k * each, size, generator=generator)
    return points + 30.0


def test_directions_are_unit_and_seen_from_the_center() -> None:
    vectors = blobs(3, 5)
    center = vectors.mean(dim=0)
    by_hand = [(v - center) / (v - center).pow(2).sum().sqrt() for v in vectors]
    torch.testing.assert_close(directions(vectors, center), torch.stack(by_hand))
    assert directions(vectors, center).norm(dim=1).tolist() == pytest.approx([1.0] * 15)


def test_without_the_center_every_cosine_is_near_one() -> None:
    vectors = blobs(3, 10)
    zero = torch.zeros(20)
    assert cosines(vectors, zero, directions(vectors, zero)).min() > 0.99
    center = vectors.mean(dim=0)
    assert cosines(vectors, center, directions(vectors, center)).min() < 0


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_number_of_clear_groups_is_found(k: int) -> None:
    made = cluster_vectors(blobs(k, 50 // k + 1, noise=0.05), None, seed=0)
    assert made.how_k["k"] == k
    assert made.how_k["rule"] == clustering.RULE
    labels = made.labels.view(-1, k)
    assert (labels == labels[0]).all()
    assert labels[0].unique().numel() == k


def test_a_split_that_is_coarser_than_the_groups_is_not_the_end() -> None:
    # One group far from four that are near each other: the mean silhouette would stop at two.
    vectors = blobs(5, 20, noise=0.02)
    vectors[::5] += 8 * (vectors[0] - 30.0)
    assert cluster_vectors(vectors, None, seed=0).how_k["k"] > 2


def test_documents_that_are_all_the_same_are_one_cluster() -> None:
    vectors = torch.randn(20, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    made = cluster_vectors(vectors, None, seed=0)
    assert made.centroids.shape == (1, 20)
    assert cluster_vectors(vectors, 5, seed=0).centroids.shape == (1, 20)


@pytest.mark.parametrize("count", [1, 2, 8, 15])
def test_few_documents_are_one_cluster(count: int) -> None:
    assert cluster_vectors(blobs(1, count), None, seed=0).how_k["k"] == 1


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 99))
def test_clusters_are_consistent(k: int, each: int, seed: int) -> None:
    vectors = blobs(3, each, seed=seed, noise=1.0)
    k = min(k, len(vectors))
    made = cluster_vectors(vectors, k, seed)
    assert 1 <= made.centroids.shape[0] <= k
    torch.testing.assert_close(made.center, vectors.mean(dim=0))
    # Every cluster has a document, and every document belongs to the nearest, as a prompt will.
    assert made.labels.unique().tolist() == list(range(made.centroids.shape[0]))
    assert torch.equal(cosines(vectors, made.center, made.centroids).argmax(dim=1), made.labels)
    again = cluster_vectors(vectors, k, seed)
    assert torch.equal(again.centroids, made.centroids)


def test_blocks_and_samples_change_nothing_but_what_they_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = blobs(3, 40)
    whole = cluster_vectors(vectors, None, seed=0)
    monkeypatch.setattr(clustering, "BLOCK", 7)
    blocked = cluster_vectors(vectors, None, seed=0)
    torch.testing.assert_close(blocked.centroids, whole.centroids)
    assert torch.equal(blocked.labels, whole.labels)
    monkeypatch.setattr(clustering, "FIT_SAMPLE", 30)
    monkeypatch.setattr(clustering, "CURVE_SAMPLE", 40)
    sampled = cluster_vectors(vectors, None, seed=0)
    assert sampled.how_k["sampled"] == 40
    assert sampled.how_k["k"] == 3
    assert sampled.labels.numel() == 120
    groups = {tuple(sampled.labels[i::3].unique().tolist()) for i in range(3)}
    assert groups == {(0,), (1,), (2,)}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10), st.integers(1, 12))
def test_the_elbow_is_farthest_below_the_chord(values: list[float], most: int) -> None:
    curve = sorted(values, reverse=True)
    k = elbow(curve, most)
    assert 1 <= k <= min(most, len(curve))
    if curve[0] <= curve[-1]:
        assert k == 1
        return

    def below(size: int) -> float:
        chord = curve[0] + (curve[-1] - curve[0]) * (size - 1) / (len(curve) - 1)
        return (chord - curve[size - 1]) / (curve[0] - curve[-1])

    assert below(k) == pytest.approx(max(below(n) for n in range(1, min(most, len(curve)) + 1)))


@pytest.mark.parametrize(
    ("k", "seed", "message"),
    [
        (0, 0, "cannot make 0 clusters of 9 documents; ask for 1 to 9"),
        (10, 0, "cannot make 10 clusters of 9 documents"),
        (2, -1, "the seed must be 0 to"),
        (2, 2**32, "the seed must be 0 to"),
    ],
)
def test_what_cannot_be_clustered_is_refused(k: int, seed: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster_vectors(blobs(3, 3), k, seed)
