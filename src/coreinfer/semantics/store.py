"""The cluster store: what a calibration corpus says about which neurons matter for what meaning.

A store is a folder of two files, `clusters.safetensors` and `clusters.json`, which may be that of a
calibration store. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from coreinfer.core.statistics import LayerStatistics
from coreinfer.core.stores import (
    check_tensor,
    description_file,
    save_store,
    tensors_file,
)
from coreinfer.errors import UserError, require_ratio, require_whole
from coreinfer.semantics.clustering import cosines
from coreinfer.semantics.encoders import Encoder, encoder_from

if TYPE_CHECKING:  # the selectors import this package
    from coreinfer.selectors.evidence import Evidence

FORMAT = "coreinfer.clusters/1"
NAME = "clusters"  # of its files
MAX_HIDDEN_SIZE = 2**20  # what a damaged description says is not allocated


@dataclass(frozen=True)
class Nearest:
    """The cluster a prompt belongs to, and the cosine to its centroid (-1 to 1)."""

    cluster: int
    similarity: float

    def describe(self) -> dict[str, Any]:
        return {"cluster": self.cluster, "similarity": round(self.similarity, 6)}


@dataclass(frozen=True, eq=False)
class ClusterStore:
    """Clusters of a corpus by meaning, each with its summed core-neuron counts.

    Counts are kept, not sets, so gamma is chosen when the store is used.

    Attributes:
        model, model_fingerprint: the model it was made for; it is refused on any other.
        hidden_size: d of that model.
        alpha: of the token-wise counts, in (0, 1].
        encoder: what a prompt is embedded by.
        center: [e]; centroids: [k, e], unit directions from the center.
        tokens: [k] int64, tokens summed over in each cluster.
        documents: [k] int64, its size.
        counts: for each layer [k, D] int64, f(n) summed over the cluster's tokens.
        positive_sums: for each layer [k, D] float64, the tie-break of the counts.
        corpus: name, size and hash of the corpus; how_k: how k was chosen. Plain JSON both.
    """

    model: str
    model_fingerprint: str
    hidden_size: int
    alpha: float
    encoder: Encoder
    center: Tensor
    centroids: Tensor
    tokens: Tensor
    documents: Tensor
    counts: Sequence[Tensor]
    positive_sums: Sequence[Tensor]
    corpus: Mapping[str, Any] = field(default_factory=dict)
    how_k: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_ratio("alpha of a cluster store", self.alpha)
        require_whole("hidden_size", self.hidden_size, 1, MAX_HIDDEN_SIZE)
        k = self.num_clusters
        check_tensor("center", self.center, (self.centroids.shape[-1],), torch.float32)
        check_tensor("centroids", self.centroids, (k, self.center.numel()), torch.float32)
        check_tensor("tokens", self.tokens, (k,), torch.int64)
        check_tensor("documents", self.documents, (k,), torch.int64)
        if k == 0 or not self.counts or len(self.counts) != len(self.positive_sums):
            raise UserError("a cluster store needs a cluster, and counts and sums of every layer")
        for layer, (counts, sums) in enumerate(zip(self.counts, self.positive_sums, strict=True)):
            check_tensor(f"counts of layer {layer}", counts, (k, counts.shape[-1]), torch.int64)
            check_tensor(
                f"positive sums of layer {layer}", sums, tuple(counts.shape), torch.float64
            )
        self.encoder.check(len(self.counts))

    @property
    def num_clusters(self) -> int:
        """k."""
        return self.centroids.shape[0]

    @property
    def num_neurons(self) -> tuple[int, ...]:
        """D of every layer."""
        return tuple(counts.shape[1] for counts in self.counts)

    def require_model(self, fingerprint: str, name: str) -> None:
        """Raises UserError unless the store was made for the model with this fingerprint."""
        if self.model_fingerprint != fingerprint:
            raise UserError(
                f"this cluster store was made for {self.model!r} ({self.model_fingerprint[:12]}), "
                f"not for {name!r} ({fingerprint[:12]}); make one with 'coreinfer cluster'"
            )

    def nearest(self, evidence: Evidence) -> Nearest:
        """The cluster whose centroid has the largest cosine to the prompt's vector."""
        vector = self.encoder.encode([evidence])
        if vector.shape[-1] != self.center.numel():
            raise UserError(
                f"the encoder gives vectors of {vector.shape[-1]} numbers, the cluster store has "
                f"{self.center.numel()}; it was made with another {self.encoder.name!r} model"
            )
        similarity = cosines(vector, self.center, self.centroids)[0]
        best = int(similarity.argmax())
        return Nearest(best, float(similarity[best]))

    def statistics(self, cluster: int) -> list[LayerStatistics]:
        """The summed statistics of one cluster, a layer each (counts and their tie-break only)."""
        return self._sum(slice(cluster, cluster + 1))

    def corpus_statistics(self) -> list[LayerStatistics]:
        """The same over the whole corpus."""
        return self._sum(slice(None))

    def _sum(self, rows: slice) -> list[LayerStatistics]:
        summed = []
        for counts, sums in zip(self.counts, self.positive_sums, strict=True):
            layer = LayerStatistics.zeros(counts.shape[1], self.hidden_size)
            layer.counts = counts[rows].sum(dim=0)
            layer.positive_sum = sums[rows].sum(dim=0)
            layer.tokens = int(self.tokens[rows].sum())
            summed.append(layer)
        return summed

    def describe(self) -> dict[str, Any]:
        """What it is, as plain JSON: what `clusters.json` holds."""
        return {
            "format": FORMAT,
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "num_layers": len(self.counts),
            "hidden_size": self.hidden_size,
            "alpha": self.alpha,
            "encoder": self.encoder.describe(),
            "corpus": dict(self.corpus),
            "k": dict(self.how_k),
            "sizes": self.documents.tolist(),
            "tokens": self.tokens.tolist(),
        }

    def save(self, path: str | Path) -> None:
        """Write the store's files into a folder, which is made unless it is there.

        What else is there stays; a cluster store is replaced only when the new one is complete.

        Raises:
            UserError: if it cannot be written, or something that is no store is there.
        """
        tensors = {
            "center": self.center,
            "centroids": self.centroids,
            "tokens": self.tokens,
            "documents": self.documents,
        }
        for layer, (counts, sums) in enumerate(zip(self.counts, self.positive_sums, strict=True)):
            tensors[f"counts.{layer}"], tensors[f"positive_sums.{layer}"] = counts, sums
        save_store(Path(path), NAME, tensors, json.dumps(self.describe(), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> ClusterStore:
        """Read a store.

        Raises:
            UserError: if it is missing, damaged, truncated, or of another format or version.
        """
        path = Path(path)
        try:
            about = json.loads(_description(path))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"no cluster store at {str(path)!r}; make one with 'coreinfer cluster'"
            ) from None
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            file = description_file(path, NAME)
            raise UserError(f"{str(file)!r} is not readable: {error}") from None
        found = about.get("format") if isinstance(about, dict) else None
        if found != FORMAT:
            raise UserError(f"{str(path)!r} has format {found!r}, expected {FORMAT!r}")
        try:
            tensors = load_file(tensors_file(path, NAME))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            file = tensors_file(path, NAME)
            raise UserError(f"{str(file)!r} is not readable: {error}") from None
        try:
            layers = range(int(about["num_layers"]))
            _check_pair(about, tensors)
            return cls(
                model=str(about["model"]),
                model_fingerprint=str(about["model_fingerprint"]),
                hidden_size=int(about["hidden_size"]),
                alpha=about["alpha"],
                encoder=encoder_from(about["encoder"]),
                center=tensors["center"],
                centroids=tensors["centroids"],
                tokens=tensors["tokens"],
                documents=tensors["documents"],
                counts=[tensors[f"counts.{layer}"] for layer in layers],
                positive_sums=[tensors[f"positive_sums.{layer}"] for layer in layers],
                corpus=dict(about["corpus"]),
                how_k=dict(about["k"]),
            )
        except UserError as error:
            raise UserError(f"{str(path)!r} is damaged: {error}") from None
        except KeyError as error:
            raise UserError(f"{str(path)!r} is damaged: it has no {error}") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{str(path)!r} is damaged: {error!r}") from None


def _description(path: Path) -> str:
    """What `clusters.json` says; while a store is being replaced, what the tensors come with."""
    try:
        return description_file(path, NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        file = tensors_file(path, NAME)
    with safe_open(file, framework="pt") as opened:
        if about := (opened.metadata() or {}).get("about"):
            return str(about)
    raise FileNotFoundError(file)


def _check_pair(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError if the two files are of different stores, as far as that shows."""
    told, found = (about["sizes"], about["tokens"]), (tensors["documents"], tensors["tokens"])
    if list(told) != [sums.tolist() for sums in found]:
        raise UserError("its description and its tensors are of different stores")
