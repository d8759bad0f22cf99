"""Random cluster stores, made in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coreinfer.semantics.encoders import CoreEncoder, HiddenEncoder
from coreinfer.semantics.store import ClusterStore


def random_store(
    seed: int = 0,
    *,
    k: int = 3,
    sizes: Sequence[int] = (10, 10, 10),
    hidden: int = 4,
    core: bool = False,
    **changes: Any,
) -> ClusterStore:
    """A store of k clusters for a model with layers of the given sizes; probe layer 1."""
    generator = torch.Generator().manual_seed(seed)
    size = sizes[1] if core else hidden
    values: dict[str, Any] = {
        "model": "tiny",
        "model_fingerprint": "f" * 64,
        "hidden_size": hidden,
        "alpha": 0.4,
        "encoder": CoreEncoder(1) if core else HiddenEncoder(1),
        "center": torch.zeros(size),
        "centroids": torch.nn.functional.normalize(torch.randn(k, size, generator=generator)),
        "tokens": torch.randint(50, 99, (k,), generator=generator),
        "documents": torch.randint(1, 9, (k,), generator=generator),
        "counts": [torch.randint(0, 50, (k, n), generator=generator) for n in sizes],
        "positive_sums": [torch.rand(k, n, generator=generator).double() for n in sizes],
        "corpus": {"name": "c.jsonl", "size": 5, "sha256": "0" * 64},
        "how_k": {"rule": "given", "k": k},
    }
    return ClusterStore(**{**values, **changes})
