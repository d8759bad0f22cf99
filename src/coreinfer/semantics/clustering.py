"""k-means over prompt vectors, and how many clusters there should be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coreinfer.errors import UserError

MAX_K = 16  # at most so many clusters unless the user asks for more
DOCUMENTS_PER_CLUSTER = 8  # and each with at least so many documents on average
CURVE_SAMPLE = 2_000  # k-means runs MAX_K times to draw the curve
FIT_SAMPLE = 10_000  # k-means holds what it is fitted on in memory
BLOCK = 4_096
RULE = (
    f"elbow: of k = 1 to documents / {DOCUMENTS_PER_CLUSTER}, the one whose inertia is farthest "
    f"below the straight line from k = 1 to {MAX_K}"
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
    how_k: dict[str, Any] = {"rule": "given"}
    if k is None:
        sample = directions(_sample(vectors, CURVE_SAMPLE, seed), center)
        inertia = _inertia_curve(sample, seed)
        k = elbow(inertia, max(1, count // DOCUMENTS_PER_CLUSTER))
        how_k = {
            "rule": RULE,
            "sampled": sample.shape[0],
            "inertia": {str(size): round(value, 6) for size, value in enumerate(inertia, 1)},
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


def elbow(inertia: Sequence[float], most: int) -> int:
    """The k up to `most` where a falling curve over k = 1, 2, ... bends away from its chord.

    Unlike the mean silhouette, which stops at the coarsest split there is (one language against
    the others), it goes on as long as another cluster explains more than clusters do on average.
    """
    first, last = inertia[0], inertia[-1]
    if first <= last:
        return 1
    steps = len(inertia) - 1
    below = [1 - i / steps - (value - last) / (first - last) for i, value in enumerate(inertia)]
    return max(range(min(most, len(below))), key=below.__getitem__) + 1


def _inertia_curve(points: Tensor, seed: int) -> list[float]:
    """Inertia of k-means for k = 1 to MAX_K, relative to k = 1."""
    most = min(MAX_K, points.shape[0])
    curve = [_k_means(points, k, seed)[1] for k in range(1, most + 1)]
    spread = curve[0] > 1e-6 * points.shape[0]  # more than documents that are all the same have
    return [value / curve[0] if spread else 0.0 for value in curve]


def _k_means(points: Tensor, k: int, seed: int) -> tuple[Tensor, float]:
    """Centroids [k, e], and the sum of the squared distances to them."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: several add up the centroids in whatever order they come to finish.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Fewer distinct points than k; the clusters left empty are dropped by the caller.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(n_clusters=k, n_init=4, random_state=seed).fit(points.numpy())
    return torch.from_numpy(fitted.cluster_centers_).float(), float(fitted.inertia_)
