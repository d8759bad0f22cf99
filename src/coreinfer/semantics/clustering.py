"""k-means over prompt vectors, and how many clusters there should be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coreinfer.errors import UserError

MAX_K = 16  # at most so many clusters unless the user asks for more
DOCUMENTS_PER_CLUSTER = 8  # and each with at least so many documents on average
SCORE_SAMPLE = 2_000  # silhouettes compare all pairs
FIT_SAMPLE = 10_000  # k-means holds what it is fitted on in memory
BLOCK = 4_096
RULE = (
    f"largest mean silhouette over k = 2 to min({MAX_K}, documents / {DOCUMENTS_PER_CLUSTER}); "
    "1 where no k has one above 0"
)


@dataclass(frozen=True, eq=False)
class Clustering:
    """Clusters of n vectors.

    Attributes:
        center: mean of the vectors, [e] float32.
        centroids: unit directions from the center, [k, e] float32 (zero where all coincide).
        labels: the cluster of each vector, [n] int64; every cluster has at least one.
        how_k: how k was chosen, plain JSON.
    """

    center: Tensor
    centroids: Tensor
    labels: Tensor
    how_k: dict[str, Any]


def directions(vectors: Tensor, center: Tensor) -> Tensor:
    """Vectors as unit directions from the center, [n, e].

    The mean of a corpus is taken off first because vectors of texts share one large common
    direction (overwhelmingly so for pooled hidden states), beside which what tells two texts
    apart is small: without centring every cosine is near 1. What then is shorter than rounding
    could make it stays short, rather than being blown up to a direction of noise.
    """
    centred = vectors - center
    smallest = 1e-5 * center.norm() + torch.finfo(torch.float32).tiny
    lengths: Tensor = centred.norm(dim=-1, keepdim=True)
    return centred / lengths.maximum(smallest)


def cosines(vectors: Tensor, center: Tensor, centroids: Tensor) -> Tensor:
    """Cosine of each vector, seen from the center, to each centroid: [n, k]."""
    return directions(vectors, center) @ centroids.T


def cluster_vectors(vectors: Tensor, k: int | None, seed: int) -> Clustering:
    """Cluster vectors by direction from their mean.

    k-means is fitted on at most FIT_SAMPLE of the vectors; each vector then belongs to the
    centroid it has the largest cosine to, as a prompt will. Clusters that are left without a
    vector (there are fewer distinct vectors than k) are dropped.

    Args:
        vectors: [n, e] float32, finite; may be a memory-mapped file, it is read in blocks.
        k: number of clusters; None to choose it by `RULE`.
        seed: the same seed gives the same clusters.

    Raises:
        UserError: if k is below 1 or above n, or the seed is outside 0 to 2**32 - 1.
    """
    count = vectors.shape[0]
    if k is not None and not 1 <= k <= count:
        raise UserError(f"cannot make {k} clusters of {count} documents; ask for 1 to {count}")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed must be 0 to {2**32 - 1}, got {seed}")
    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for block in _blocks(vectors):
        total += block.double().sum(dim=0)
    center = (total / count).float()
    how_k: dict[str, Any] = {"rule": "given", "scores": {}}
    if k is None:
        sample = directions(_sample(vectors, SCORE_SAMPLE, seed), center)
        scores = _silhouettes(sample, min(MAX_K, count // DOCUMENTS_PER_CLUSTER), seed)
        best = max(scores, key=lambda size: scores[size], default=1)
        k = best if scores.get(best, 0.0) > 0 else 1
        how_k = {
            "rule": RULE,
            "sampled": sample.shape[0],
            "scores": {str(size): round(score, 6) for size, score in scores.items()},
        }
    # Ten vectors a cluster at the least, however many clusters are asked for.
    sample = directions(_sample(vectors, max(FIT_SAMPLE, 10 * k), seed), center)
    centroids = torch.nn.functional.normalize(_k_means(sample, k, seed)[0], dim=-1)
    labels = torch.cat(
        [cosines(block, center, centroids).argmax(dim=-1) for block in _blocks(vectors)]
    )
    used, labels = labels.unique(return_inverse=True)
    return Clustering(center, centroids[used], labels, {**how_k, "k": used.numel()})


def _blocks(vectors: Tensor) -> Iterator[Tensor]:
    return iter(vectors.split(BLOCK))


def _sample(vectors: Tensor, size: int, seed: int) -> Tensor:
    """At most `size` of the vectors, in their order."""
    if vectors.shape[0] <= size:
        return vectors
    generator = torch.Generator().manual_seed(seed)
    return vectors[torch.randperm(vectors.shape[0], generator=generator)[:size].sort().values]


def _silhouettes(points: Tensor, most: int, seed: int) -> dict[int, float]:
    """Mean silhouette of k-means with k = 2 to `most` clusters, where it is defined."""
    from sklearn.metrics import silhouette_score

    distances = torch.cdist(points, points).fill_diagonal_(0.0).numpy()
    scores = {}
    for k in range(2, most + 1):
        labels = _k_means(points, k, seed)[1]
        if 1 < labels.unique().numel() < labels.numel():
            scores[k] = float(silhouette_score(distances, labels.numpy(), metric="precomputed"))
    return scores


def _k_means(points: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids [k, e] and labels [n]."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: several add up the centroids in whatever order they come to finish.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Fewer distinct points than k; the clusters left empty are dropped by the caller.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(n_clusters=k, n_init=4, random_state=seed).fit(points.numpy())
    return torch.from_numpy(fitted.cluster_centers_).float(), torch.from_numpy(
        fitted.labels_
    ).long()
