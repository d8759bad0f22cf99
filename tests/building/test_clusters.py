"""A built store is the sum of its clusters' documents, whatever way they were read."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections import Counter
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coreinfer.building import clusters as build_module
from coreinfer.building import reading as reading_module
from coreinfer.building import work as work_module
from coreinfer.errors import UserError
from coreinfer.selectors import Evidence
from coreinfer.semantics.clustering import cosines
from coreinfer.semantics.encoders import CoreEncoder, Encoder, HiddenEncoder
from coreinfer.semantics.store import ClusterStore
from tests.building.corpora import build, documents, write_corpus
from tests.hf.reference import activations
from tests.tiny import BOS, tiny_backend

ALPHA = 0.4


def naive_counts(h: Tensor, alpha: float) -> list[int]:
    """f(n) by the definition: token by token, sorting plain numbers."""
    counts = Counter[int]()
    for token in h.tolist():
        positive = sorted(
            (n for n, value in enumerate(token) if value > 0), key=lambda n: -token[n]
        )
        counts.update(positive[: max(1, ceil(round(alpha * len(positive), 9)))])
    return [counts[n] for n in range(h.shape[1])]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents())


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("encoder", [HiddenEncoder(1), CoreEncoder(2)], ids=["hidden", "core"])
def test_a_build_equals_reading_the_documents_one_by_one(
    tmp_path: Path, corpus: Path, model_type: str, encoder: Encoder
) -> None:
    backend = tiny_backend(model_type)
    store = build(backend, corpus, tmp_path / "store", encoder=encoder)

    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    read = [activations(backend.model, backend.tokenizer(text).input_ids) for text in texts]
    # The vectors: mean over the tokens of the probe layer's x, or how often a neuron is core.
    layer = encoder.describe()["layer"]
    vectors = []
    for layers in read:
        x, h = layers[layer]
        counts = torch.tensor(naive_counts(h, ALPHA))
        vectors.append(x.mean(dim=0) if encoder.name == "hidden" else counts / len(h))
    stacked = torch.stack(vectors)
    torch.testing.assert_close(store.center, stacked.mean(dim=0), atol=1e-5, rtol=1e-5)
    labels = cosines(stacked, store.center, store.centroids).argmax(dim=1)
    assert labels.unique().numel() == 3

    assert store.documents.tolist() == [int((labels == c).sum()) for c in range(3)]
    for cluster in range(3):
        own = [read[i] for i in range(len(texts)) if labels[i] == cluster]
        assert store.tokens[cluster] == sum(len(layers[0][1]) for layers in own)
        for index in range(3):
            together = torch.cat([layers[index][1] for layers in own])
            assert store.counts[index][cluster].tolist() == naive_counts(together, ALPHA)
            torch.testing.assert_close(
                store.positive_sums[index][cluster],
                together.double().clamp(min=0).sum(dim=0),
                atol=1e-4,
                rtol=1e-5,
            )


@pytest.mark.parametrize("encoder", [HiddenEncoder(1), CoreEncoder(1)], ids=["hidden", "core"])
def test_the_batch_size_changes_nothing(tmp_path: Path, corpus: Path, encoder: Encoder) -> None:
    stores = [
        build(tiny_backend(), corpus, tmp_path / "store", encoder=encoder, k=None, batch_size=size)
        for size in (1, 4, 100)
    ]
    one = stores[0]
    assert one.num_clusters == 3
    for store in stores[1:]:
        assert store.documents.tolist() == one.documents.tolist()
        assert store.tokens.tolist() == one.tokens.tolist()
        for layer in range(3):
            assert torch.equal(store.counts[layer], one.counts[layer])
            torch.testing.assert_close(
                store.positive_sums[layer], one.positive_sums[layer], atol=1e-4, rtol=1e-6
            )


def test_the_window_of_documents_held_changes_no_count(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(tiny_backend(), corpus, tmp_path / "store", k=1)
    monkeypatch.setattr(reading_module, "WINDOW", 7)
    other = build(tiny_backend(), corpus, tmp_path / "store", k=1, batch_size=3)
    assert all(torch.equal(a, b) for a, b in zip(one.counts, other.counts, strict=True))


def test_clusters_follow_the_subjects(tmp_path: Path, corpus: Path) -> None:
    backend = tiny_backend()
    store = build(backend, corpus, tmp_path / "store", k=None)
    assert store.documents.tolist() == [10, 10, 10]
    assert store.how_k["rule"].startswith("elbow")
    assert store.how_k["k"] == 3
    given = build(backend, corpus, tmp_path / "store", k=5)
    assert given.num_clusters == 5
    assert given.how_k == {"rule": "given", "k": 5}


def test_what_is_written_is_what_is_returned(tmp_path: Path, corpus: Path) -> None:
    backend = tiny_backend()
    store = build(backend, corpus, tmp_path / "store")
    loaded = ClusterStore.load(tmp_path / "store")
    assert loaded.describe() == store.describe()
    assert torch.equal(loaded.centroids, store.centroids)
    assert loaded.model_fingerprint == backend.fingerprint
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["store", "store/clusters.json", "store/clusters.safetensors"]


def test_neither_bos_nor_padding_counts(tmp_path: Path) -> None:
    texts = ["ab", "a" * 40, "abc"]
    backend = tiny_backend()
    with_bos = tiny_backend()
    plain = with_bos.tokenizer.__class__.__call__

    class Adding(type(with_bos.tokenizer)):  # type: ignore[misc]
        """Begins every text with the BOS token, as Llama's tokenizer does."""

        def __call__(self, text: str, **options: object) -> object:
            encoded = plain(self, text, **options)
            encoded["input_ids"] = [BOS, *encoded["input_ids"]]
            return encoded

        def num_special_tokens_to_add(self, pair: bool = False) -> int:
            return 1

    with_bos.tokenizer.__class__ = Adding
    corpus = write_corpus(tmp_path / "c.jsonl", texts)
    for one in (backend, with_bos):
        store = build(one, corpus, tmp_path / "store", k=1, batch_size=3)
        assert int(store.tokens.sum()) == 2 + 40 + 3


def test_long_documents_are_cut_and_the_store_says_so(tmp_path: Path) -> None:
    texts = ["abc" * 20, "ab", "x" * 16, "y" * 17]
    whole = write_corpus(tmp_path / "whole.jsonl", texts)
    cut = write_corpus(tmp_path / "cut.jsonl", [text[:16] for text in texts])
    a = build(tiny_backend(), whole, tmp_path / "a", k=2, max_tokens=16)
    b = build(tiny_backend(), cut, tmp_path / "b", k=2, max_tokens=16)
    assert all(torch.equal(x, y) for x, y in zip(a.counts, b.counts, strict=True))
    about = json.loads((tmp_path / "a" / "clusters.json").read_text())["corpus"]
    assert about | {"max_tokens": 16, "cut_documents": 2, "documents": 4} == about
    assert b.corpus["cut_documents"] == 0


def test_no_more_is_read_than_the_context_holds(tmp_path: Path) -> None:
    backend = tiny_backend()
    corpus = write_corpus(tmp_path / "c.jsonl", ["a" * 600])
    store = build(backend, corpus, tmp_path / "store", k=1, max_tokens=10_000)
    assert store.corpus["max_tokens"] == backend.context_length == 512
    assert store.tokens.tolist() == [512]


def test_every_bad_line_is_told_once_and_the_rest_is_used(tmp_path: Path) -> None:
    good = documents(6)
    lines = [json.dumps(text) for text in good]
    lines[2:2] = ["{broken", '{"title": 1}']
    lines.append('"ab"')
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(lines))
    problems: list[str] = []
    store = build(tiny_backend(), corpus, tmp_path / "a", k=2, min_chars=3, on_skip=problems.append)
    assert [f"line {n} " in problem for n, problem in zip((3, 4, 9), problems, strict=True)] == [
        True
    ] * 3
    alone = build(tiny_backend(), write_corpus(tmp_path / "g.jsonl", good), tmp_path / "b", k=2)
    assert all(torch.equal(x, y) for x, y in zip(store.counts, alone.counts, strict=True))


def test_a_document_without_a_token_is_skipped_by_its_line(tmp_path: Path) -> None:
    backend = tiny_backend()
    plain = backend.tokenizer.__class__.__call__

    class Deaf(type(backend.tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **options: object) -> object:
            return plain(self, text.replace("?", ""), **options)

    backend.tokenizer.__class__ = Deaf
    problems: list[str] = []
    corpus = write_corpus(tmp_path / "c.jsonl", ["ab", "??", "xy"])
    store = build(backend, corpus, tmp_path / "store", k=2, on_skip=problems.append)
    assert store.documents.sum() == 2
    assert problems == [f"{str(corpus)!r}: line 2 has no token in this model's vocabulary"]
    corpus = write_corpus(tmp_path / "none.jsonl", ["??"])
    with pytest.raises(UserError, match="no document with a token"):
        build(backend, corpus, tmp_path / "store", on_skip=problems.append)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"alpha": 1.5}, "alpha must be above 0"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": 31}, "cannot make 31 clusters of 30 documents"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"encoder": HiddenEncoder(3)}, "probe layer 3 is outside the model"),
        ({"min_chars": 10_000}, "no usable document"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, corpus: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(tiny_backend(), corpus, tmp_path / "store", **{"on_skip": len, **options})
    assert not (tmp_path / "store").exists()


def test_places_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module._Build, "embed", None)
    with pytest.raises(UserError, match="No such file or directory"):
        build(tiny_backend(), corpus, tmp_path / "none" / "store")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists and is no calibration or cluster store"):
        build(tiny_backend(), corpus, tmp_path / "mine")
    (tmp_path / ".store.work").mkdir()
    (tmp_path / ".store.work" / "diary").touch()
    with pytest.raises(UserError, match="has a file 'diary' of something else"):
        build(tiny_backend(), corpus, tmp_path / "store")
    assert (tmp_path / ".store.work" / "diary").exists()


def test_a_full_disk_is_one_line_and_the_work_is_kept(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = build(tiny_backend(), corpus, tmp_path / "a", batch_size=4)
    saved = work_module.save_file
    room = 12

    def full(*args: object) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(work_module, "save_file", full)
    with pytest.raises(UserError, match="no space left while writing") as caught:
        build(tiny_backend(), corpus, tmp_path / "b", batch_size=4)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    notes: list[str] = []
    store = build(tiny_backend(), corpus, tmp_path / "b", batch_size=4, on_note=notes.append)
    assert notes == [
        "going on with 30 documents embedded",
        "going on after counting 8 documents",
    ]
    assert all(torch.equal(x, y) for x, y in zip(store.counts, uninterrupted.counts, strict=True))


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", documents(6))

    class Meddler(HiddenEncoder):
        def encode(self, evidences: list[Evidence]) -> Tensor:  # type: ignore[override]
            write_corpus(corpus, documents(7))
            return super().encode(evidences)

    with pytest.raises(UserError, match="was changed while it was read"):
        build(tiny_backend(), corpus, tmp_path / "store", encoder=Meddler(1))
    assert not (tmp_path / "store").exists()


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, corpus: Path) -> None:
    class Broken(HiddenEncoder):
        def encode(self, evidences: list[Evidence]) -> Tensor:  # type: ignore[override]
            return super().encode(evidences) * torch.nan

    with pytest.raises(UserError, match="vectors that are not finite"):
        build(tiny_backend(), corpus, tmp_path / "store", encoder=Broken(1))


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_drawn_for_a_terminal_alone(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, progress: bool
) -> None:
    class Stderr(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stderr = Stderr()
    monkeypatch.setattr(sys, "stderr", stderr)
    build(tiny_backend(), corpus, tmp_path / "store", progress=progress)
    drawn = stderr.getvalue()
    assert ("embedding" in drawn and "30/30" in drawn) == (terminal and progress)
    assert bool(drawn) == (terminal and progress)
