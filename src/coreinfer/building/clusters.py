"""Building a cluster store: two passes over a corpus of any size in a bounded amount of memory.

First each document's vector, written to a file; then k-means; then each document's core-neuron
counts, added to its cluster. An interrupted build goes on from its last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from coreinfer.backends.base import Backend
from coreinfer.building.corpus import corpus_identity
from coreinfer.building.reading import Skips, TokenCorpus, TokenDocument
from coreinfer.building.work import Checkpoint, WorkFolder, work_folder
from coreinfer.core.statistics import LayerStatistics
from coreinfer.core.stores import remove_store_leftovers, require_place
from coreinfer.errors import UserError, require_ratio, require_whole
from coreinfer.jsonl import OnSkip
from coreinfer.recording import RecordingPlan
from coreinfer.selectors.evidence import Evidence
from coreinfer.semantics.clustering import Clustering, cluster_vectors
from coreinfer.semantics.encoders import Encoder
from coreinfer.semantics.store import NAME, ClusterStore

CHECKPOINT_SECONDS = 60.0
STAGES = ("vectors", "clusters", "counts")


def build_clusters(
    backend: Backend,
    corpus: Path,
    out: Path,
    *,
    encoder: Encoder,
    alpha: float = 0.4,
    k: int | None = None,
    seed: int = 0,
    max_tokens: int = 512,
    batch_size: int = 8,
    min_chars: int = 1,
    on_skip: OnSkip,
    on_note: Callable[[str], None] = lambda _note: None,
    progress: bool = True,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> ClusterStore:
    """Cluster a corpus by meaning and sum each cluster's core-neuron counts (arXiv 2410.18311).

    The work folder `.{out's name}.work` lies beside `out` until the store is written. The same call
    after an interruption goes on from there, and the store is the same to the last bit. Another
    batch size gives the same store up to the rounding of the model's own arithmetic.

    Args:
        backend: the model.
        corpus: a file as `read_corpus` takes it.
        out: the store's folder, which may be a calibration store's; a cluster store that is there
            is replaced when the new one is whole.
        encoder: what documents, and later prompts, are embedded by.
        alpha: fraction of each token's positive activations that count, in (0, 1].
        k: number of clusters; None to choose it (see `clustering`).
        seed: of the k-means.
        max_tokens: a longer document is cut to so many tokens, from 2; never above the context.
        batch_size: documents prefilled together.
        min_chars: a shorter document is skipped.
        on_skip: told of every document or line that is skipped, once each.
        on_note: told whether a former run's work goes on, or why it is done again.
        progress: draw progress bars on stderr, where that is a terminal.
        checkpoint_seconds: seconds between checkpoints at least.

    Raises:
        UserError: for settings out of range, a corpus that cannot be read or has no usable
            document, or a place that cannot be written.
    """
    corpus, out = Path(corpus), Path(out)
    require_ratio("alpha", alpha)
    require_whole("max_tokens", max_tokens, 2)
    require_whole("batch_size", batch_size, 1)
    require_whole("seed", seed, 0, 2**32 - 1)
    if k is not None:
        require_whole("k", k, 1)
    encoder.check(len(backend.cost.num_neurons))
    require_place(out)
    max_tokens = min(max_tokens, backend.context_length or max_tokens)
    identity = corpus_identity(corpus)
    reading: dict[str, Any] = {
        "model_fingerprint": backend.fingerprint,
        "backend": backend.name,
        "dtype": backend.dtype,
        "corpus": identity,
        "encoder": encoder.describe(),
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "min_chars": min_chars,
    }
    if encoder.needs_counts:
        reading["alpha"] = alpha
    reader = TokenCorpus(
        corpus, backend.tokenizer, max_tokens, batch_size, min_chars, Skips(on_skip)
    )
    if k is not None:
        _require_documents(reader, k)
    place = out.with_name(f".{out.name}.work")
    with work_folder(place, STAGES, on_note, checkpoint_seconds) as work:
        build = _Build(
            backend, reader, encoder, alpha, work, on_note, progress,
        )  # fmt: skip
        read = build.embed(reading)
        clustering = build.cluster(read, {**reading, "k": k, "seed": seed})
        totals = build.count(clustering, {**reading, "k": k, "seed": seed, "alpha": alpha})
        if corpus_identity(corpus) != identity:
            raise UserError(f"{str(corpus)!r} was changed while it was read; start again")
        store = ClusterStore(
            model=backend.model_name,
            model_fingerprint=backend.fingerprint,
            hidden_size=totals.hidden_size,
            alpha=alpha,
            encoder=encoder,
            center=clustering.center,
            centroids=clustering.centroids,
            tokens=totals.tokens,
            documents=totals.documents,
            counts=totals.counts,
            positive_sums=totals.positive_sums,
            corpus={
                **identity,
                "documents": read.documents,
                "max_tokens": max_tokens,
                "cut_documents": read.cut,
            },
            how_k=clustering.how_k,
        )
        store.save(out)
        remove_store_leftovers(out, NAME)  # of a run that was killed while it saved
    return store


def _require_documents(reader: TokenCorpus, k: int) -> None:
    """Raises UserError where a corpus has no `k` documents, before all of them are embedded."""
    silent = replace(reader, skips=Skips(lambda _problem: None))
    count = sum(1 for _ in islice(silent.documents(), k))
    if 0 < count < k:
        raise UserError(f"cannot make {k} clusters of {count} documents; ask for 1 to {count}")


@dataclass(frozen=True)
class _Read:
    """The first pass, done: vectors [n, e] in a memory-mapped file, and how many were cut."""

    vectors: Tensor
    cut: int

    @property
    def documents(self) -> int:
        return self.vectors.shape[0]


@dataclass
class _Totals:
    """The sums of the second pass, shaped as in `ClusterStore`; all zero before the first batch."""

    hidden_size: int
    tokens: Tensor
    documents: Tensor
    counts: list[Tensor]
    positive_sums: list[Tensor]

    @classmethod
    def zeros(cls, clusters: int, layers: Sequence[LayerStatistics]) -> _Totals:
        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(clusters, *shape, dtype=dtype)

        return cls(
            layers[0].input_sum.numel(),
            empty(),
            empty(),
            [empty(layer.num_neurons) for layer in layers],
            [empty(layer.num_neurons, dtype=torch.float64) for layer in layers],
        )

    def add(self, cluster: int, layers: Sequence[LayerStatistics]) -> None:
        self.documents[cluster] += 1
        self.tokens[cluster] += int(layers[0].tokens)
        for layer, counts, sums in zip(layers, self.counts, self.positive_sums, strict=True):
            counts[cluster] += layer.counts.cpu()
            sums[cluster] += layer.positive_sum.cpu()

    def checkpoint(self, batches: int) -> Checkpoint:
        tensors = {"tokens": self.tokens, "documents": self.documents}
        tensors |= {f"counts.{layer}": counts for layer, counts in enumerate(self.counts)}
        tensors |= {f"sums.{layer}": sums for layer, sums in enumerate(self.positive_sums)}
        return Checkpoint({"batches": batches, "hidden_size": self.hidden_size}, tensors)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Totals:
        tensors = checkpoint.tensors
        layers = range((len(tensors) - 2) // 2)
        return cls(
            int(checkpoint.state["hidden_size"]),
            tensors["tokens"],
            tensors["documents"],
            [tensors[f"counts.{layer}"] for layer in layers],
            [tensors[f"sums.{layer}"] for layer in layers],
        )


@dataclass(frozen=True)
class _Build:
    """The three stages, each of which goes on from its checkpoint or begins at the beginning."""

    backend: Backend
    reader: TokenCorpus
    encoder: Encoder
    alpha: float
    work: WorkFolder
    on_note: Callable[[str], None]
    progress: bool

    def embed(self, settings: dict[str, Any]) -> _Read:
        """First pass: the documents' vectors."""
        found = self.work.load("vectors", settings)
        state = {"batches": 0, "documents": 0, "cut": 0, "size": 0, "complete": False}
        if found and self.work.has_vectors(4 * found.state["documents"] * found.state["size"]):
            state = dict(found.state)
        if state["complete"]:
            self.on_note(f"going on with {state['documents']} documents embedded")
        else:
            state = self._embed_from(state, settings)
        shape = (state["documents"], state["size"])
        vectors = torch.from_file(
            str(self.work.vector_file), size=shape[0] * shape[1], dtype=torch.float32
        )
        return _Read(vectors.view(shape), state["cut"])

    def _embed_from(self, state: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        plan = RecordingPlan(
            alpha=self.alpha if self.encoder.needs_counts else None, input_sums=True
        )
        batches = islice(self.reader.batches(), state["batches"], None)
        with (
            self.work.append_vectors(4 * state["documents"] * state["size"]) as file,
            self._bar("embedding", done=state["documents"]) as bar,
        ):
            for batch in batches:
                if self.encoder.needs_prefill:
                    evidence = self._prefill(batch, plan)
                else:
                    evidence = [_text_only(document.text) for document in batch]
                vectors = self.encoder.encode(evidence)
                if not vectors.isfinite().all():
                    raise UserError(
                        f"the encoder {self.encoder.name!r} gives vectors that are not finite; "
                        "use another"
                    )
                file.write(vectors.contiguous().numpy().tobytes())
                state = {
                    "batches": state["batches"] + 1,
                    "documents": state["documents"] + len(batch),
                    "cut": state["cut"] + sum(document.cut for document in batch),
                    "size": vectors.shape[1],
                    "complete": False,
                }
                bar.update(len(batch))
                if self.work.is_due:
                    file.flush()
                    self.work.save("vectors", settings, Checkpoint(state))
        if not state["documents"]:
            raise UserError(f"{str(self.reader.path)!r} has no document with a token to read")
        state["complete"] = True
        self.work.save("vectors", settings, Checkpoint(state))
        self.reader.skips.pass_done()
        return state

    def cluster(self, read: _Read, settings: dict[str, Any]) -> Clustering:
        """k-means over the vectors."""
        if found := self.work.load("clusters", settings):
            return Clustering(**found.tensors, how_k=found.state["how_k"])
        k, seed = settings["k"], settings["seed"]
        made = cluster_vectors(read.vectors, k, seed)
        # What is read from a checkpoint is JSON, so that is what is used where it is not.
        how_k = json.loads(json.dumps(made.how_k))
        tensors = {"center": made.center, "centroids": made.centroids, "labels": made.labels}
        self.work.save("clusters", settings, Checkpoint({"how_k": how_k}, tensors))
        return Clustering(**tensors, how_k=how_k)

    def count(self, clustering: Clustering, settings: dict[str, Any]) -> _Totals:
        """Second pass: the counts of each document, added to its cluster."""
        found = self.work.load("counts", settings)
        totals = _Totals.of(found) if found else None
        batches = int(found.state["batches"]) if found else 0
        labels = iter(clustering.labels.tolist())
        done = 0 if totals is None else int(totals.documents.sum())
        with self._bar("counting", done=done, total=clustering.labels.numel()) as bar:
            for number, batch in enumerate(self.reader.batches(), start=1):
                clusters = list(islice(labels, len(batch)))
                if number <= batches:
                    continue
                evidence = self._prefill(batch, RecordingPlan(alpha=self.alpha, input_sums=True))
                if totals is None:
                    totals = _Totals.zeros(clustering.centroids.shape[0], evidence[0].layers)
                for cluster, one in zip(clusters, evidence, strict=False):
                    totals.add(cluster, one.layers)
                bar.update(len(batch))
                if self.work.is_due:
                    self.work.save("counts", settings, totals.checkpoint(number))
        self.reader.skips.pass_done()
        assert totals is not None  # a corpus without a document was refused before
        return totals

    def _prefill(self, batch: Sequence[TokenDocument], plan: RecordingPlan) -> list[Evidence]:
        session = self.backend.start(plan)
        session.prefill([document.ids for document in batch], [one.text for one in batch])
        return session.evidence()

    def _bar(self, what: str, *, done: int, total: int | None = None) -> Any:
        if done:
            self.on_note(f"going on after {what} {done} documents")
        # None is tqdm's "unless stderr is no terminal".
        disable = None if self.progress else True
        return tqdm(desc=what, unit="doc", initial=done, total=total, disable=disable)


def _text_only(text: str) -> Evidence:
    return Evidence(layers=(), column_norms=lambda _layer: torch.empty(0), text=text)
