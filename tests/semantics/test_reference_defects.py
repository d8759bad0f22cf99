"""What the method's reference code gets wrong about clusters, each as what must be true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coreinfer.backends.base import Backend
from coreinfer.core.statistics import LayerStatistics
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Auto, Evidence, Similarity
from coreinfer.semantics.clustering import cluster_vectors
from coreinfer.semantics.encoders import CoreEncoder, Encoder, HiddenEncoder
from coreinfer.semantics.store import ClusterStore
from tests.building.corpora import SUBJECTS, build, documents, write_corpus
from tests.hf.reference import activations
from tests.selectors.evidence import prompt
from tests.semantics.stores import random_store
from tests.tiny import tiny_backend

ENCODERS = [HiddenEncoder(1), CoreEncoder(1)]


def ids(encoder: Encoder) -> str:
    return encoder.name


def read(backend: Backend, text: str, alpha: float = 0.4) -> Evidence:
    session = backend.start(RecordingPlan(alpha=alpha, input_sums=True))
    session.prefill([backend.tokenizer(text).input_ids], [text])
    return session.evidence()[0]


@pytest.fixture(scope="module", params=ENCODERS, ids=ids)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ClusterStore:
    folder = tmp_path_factory.mktemp("defects")
    corpus = write_corpus(folder / "c.jsonl", documents())
    return build(tiny_backend(), corpus, folder / "store", encoder=request.param)


# The reference embeds a Llama prompt by positions of its tokens, so by its length.


@pytest.mark.parametrize("count", [1, 3, 10, 40])
def test_prompts_of_different_length_and_same_meaning_share_a_cluster(
    store: ClusterStore, count: int
) -> None:
    backend = tiny_backend()
    clusters = [store.nearest(read(backend, " ".join([*words] * count))) for words in SUBJECTS]
    assert len({near.cluster for near in clusters}) == 3
    reference = [store.nearest(read(backend, " ".join([*words] * 5))) for words in SUBJECTS]
    assert [near.cluster for near in clusters] == [near.cluster for near in reference]


def test_prompts_of_same_length_and_different_meaning_do_not(store: ClusterStore) -> None:
    texts = [" ".join([words[0]] * 8) for words in SUBJECTS]
    assert len({len(text) for text in texts}) == 1
    assert len({store.nearest(read(tiny_backend(), text)).cluster for text in texts}) == 3


# The reference's similarity mode keeps four fifths of the neurons whatever its "sparsity" says.


@pytest.mark.parametrize("gamma", [0.1, 0.4, 0.8, 1.0])
def test_gamma_sets_the_size_of_the_set(store: ClusterStore, gamma: float) -> None:
    layers = Similarity(clusters=store, gamma=gamma).select(read(tiny_backend(), "abc")).layers
    assert [layers[layer].numel() for layer in range(3)] == [round(gamma * 48)] * 3


# The reference never resets its counts between clusters: the last has the whole data set.


def test_a_cluster_counts_only_its_own_documents(tmp_path: Path) -> None:
    backend = tiny_backend()
    corpus = write_corpus(tmp_path / "c.jsonl", documents())
    whole = build(backend, corpus, tmp_path / "store")
    found = []
    for subject in range(3):
        own = write_corpus(tmp_path / f"{subject}.jsonl", documents()[subject::3])
        alone = build(backend, own, tmp_path / f"{subject}", k=1)
        near = whole.nearest(read(backend, documents()[subject])).cluster
        found.append(near)
        assert whole.tokens[near] == alone.tokens[0]
        for layer in range(3):
            assert torch.equal(whole.counts[layer][near], alone.counts[layer][0])
    assert sorted(found) == [0, 1, 2]


def test_clusters_add_up_to_the_corpus(tmp_path: Path, store: ClusterStore) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", documents())
    one = build(tiny_backend(), corpus, tmp_path / "store", k=1)
    for whole, alone in zip(store.corpus_statistics(), one.statistics(0), strict=True):
        assert torch.equal(whole.counts, alone.counts)
        assert whole.tokens == alone.tokens == sum(len(text) for text in documents())


# The reference clusters by the gate before its activation, and infers by what down_proj reads.


@pytest.mark.parametrize("encoder", ENCODERS, ids=ids)
def test_clustering_and_inference_use_the_same_statistic(tmp_path: Path, encoder: Encoder) -> None:
    backend, texts = tiny_backend(), documents(6)
    corpus = write_corpus(tmp_path / "c.jsonl", texts)
    # One document a cluster: each must find itself again, with nothing in between.
    store = build(backend, corpus, tmp_path / "store", encoder=encoder, k=6, batch_size=1)
    assert store.documents.tolist() == [1] * 6
    for text in texts:
        evidence = read(backend, text)
        near = store.nearest(evidence)
        assert near.similarity == pytest.approx(1.0, abs=1e-5)
        for mine, its in zip(evidence.layers, store.statistics(near.cluster), strict=True):
            assert torch.equal(mine.counts, its.counts)
            torch.testing.assert_close(mine.positive_sum, its.positive_sum)


def test_the_statistic_is_of_what_the_down_projection_reads(tmp_path: Path) -> None:
    backend = tiny_backend()
    corpus = write_corpus(tmp_path / "c.jsonl", ["abc"])
    store = build(backend, corpus, tmp_path / "store", k=1, alpha=1.0)
    for layer, (_x, h) in enumerate(activations(backend.model, backend.tokenizer("abc").input_ids)):
        assert store.counts[layer][0].tolist() == (h > 0).sum(dim=0).tolist()


def test_the_alpha_of_the_clusters_is_that_of_the_prompt(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", documents(6))
    store = build(tiny_backend(), corpus, tmp_path / "s", encoder=CoreEncoder(1), alpha=0.2, k=2)
    assert json.loads((tmp_path / "s" / "clusters.json").read_text())["alpha"] == 0.2
    assert Similarity(clusters=store).counting_alpha == 0.2
    assert Auto(clusters=store).counting_alpha == 0.2


# The reference's classes are range(0, 16383): the last of 16384 neurons is never seen.


@pytest.mark.parametrize("size", [8, 16384])
def test_the_last_neuron_can_be_chosen(size: int) -> None:
    counts, sums = torch.zeros(1, size, dtype=torch.int64), torch.zeros(1, size).double()
    counts[0, -1] = 4
    store = random_store(
        k=1, sizes=(size,) * 3, counts=[counts] * 3, positive_sums=[sums] * 3
    )  # fmt: skip
    selector = Similarity(clusters=store, gamma=1 / size)
    assert selector.select(prompt(sizes=(size,) * 3).evidence()).layers[0].tolist() == [size - 1]


def test_the_last_neuron_alone_can_tell_two_prompts_apart() -> None:
    evidences = []
    for last in (-1.0, 1.0) * 8:
        h = torch.full((4, 16384), -1.0)
        h[:, 0], h[:, -1] = 1.0, last
        stats = LayerStatistics.zeros(16384, 1)
        stats.update(torch.zeros(4, 1), h, 1.0)
        evidences.append(Evidence([stats], lambda _layer: torch.empty(0)))
    vectors = CoreEncoder(0).encode(evidences)
    assert vectors[1].nonzero().flatten().tolist() == [0, 16383]
    labels = cluster_vectors(vectors, 2, seed=0).labels.tolist()
    assert labels in ([0, 1] * 8, [1, 0] * 8)
