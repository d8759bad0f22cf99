"""The cluster store: what is saved is read, and nothing damaged is."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coreinfer.errors import UserError
from coreinfer.semantics.encoders import CoreEncoder, HiddenEncoder, SentenceEncoder
from coreinfer.semantics.store import ClusterStore
from tests.selectors.evidence import prompt
from tests.semantics.stores import random_store

FILES = ("clusters.json", "clusters.safetensors")


def same(a: ClusterStore, b: ClusterStore) -> bool:
    def tensors(store: ClusterStore) -> list[torch.Tensor]:
        sums = [*store.counts, *store.positive_sums]
        return [store.center, store.centroids, store.tokens, store.documents, *sums]

    equal = all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    return equal and a.describe() == b.describe() and a.encoder == b.encoder


@given(
    st.integers(0, 99),
    st.integers(1, 5),
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.booleans(),
)
def test_what_is_saved_is_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, k: int, sizes: list[int], core: bool
) -> None:
    store = random_store(seed, k=k, sizes=sizes, core=core)
    path = tmp_path_factory.mktemp("s") / "store"
    store.save(path)
    assert same(ClusterStore.load(path), store)
    assert ClusterStore.load(path).num_neurons == tuple(sizes)


@pytest.mark.parametrize("encoder", [HiddenEncoder(2), CoreEncoder(0), SentenceEncoder("m")])
def test_the_encoder_is_kept(tmp_path: Path, encoder: Any) -> None:
    random_store(encoder=encoder).save(tmp_path / "s")
    assert ClusterStore.load(tmp_path / "s").encoder == encoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "store"
    random_store().save(path)
    return path


def damaged(folder: Path, saved: Path, name: str, data: bytes) -> Path:
    shutil.copytree(saved, folder / "store", dirs_exist_ok=True)
    (folder / "store" / name).write_bytes(data)
    return folder / "store"


@given(st.data())
@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_are_a_store_or_a_users_error(
    tmp_path_factory: pytest.TempPathFactory, saved: Path, name: str, data: st.DataObject
) -> None:
    content = bytearray((saved / name).read_bytes())
    # The head of a safetensors file is where damage does most.
    head = 8 + int.from_bytes(content[:8], "little")
    last = len(content) - 1 if name == "clusters.json" else head
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    path = damaged(tmp_path_factory.mktemp("d"), saved, name, bytes(content))
    with contextlib.suppress(UserError):
        store = ClusterStore.load(path)
        # Whatever was read can be used.
        store.describe()
        store.corpus_statistics()
        assert store.num_clusters == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
KEYS = (
    "format", "model", "model_fingerprint", "num_layers", "hidden_size", "alpha", "encoder",
    "corpus", "k",
)  # fmt: skip


@given(st.sampled_from(KEYS), JSON)
@example("num_layers", 10**30)
@example("num_layers", -1)
@example("hidden_size", -3)
@example("hidden_size", 10**15)
@example("alpha", float("nan"))
@example("encoder", {"name": "hidden", "layer": True})
def test_a_description_with_any_other_value_is_a_store_or_a_users_error(
    tmp_path_factory: pytest.TempPathFactory, saved: Path, key: str, value: Any
) -> None:
    about = json.loads((saved / "clusters.json").read_text())
    content = json.dumps({**about, key: value}).encode()
    path = damaged(tmp_path_factory.mktemp("d"), saved, "clusters.json", content)
    with contextlib.suppress(UserError):
        store = ClusterStore.load(path)
        store.corpus_statistics()
        json.dumps(store.describe())


@pytest.mark.parametrize("key", KEYS)
def test_a_description_without_a_key_is_refused(tmp_path: Path, saved: Path, key: str) -> None:
    about = json.loads((saved / "clusters.json").read_text())
    del about[key]
    path = damaged(tmp_path, saved, "clusters.json", json.dumps(about).encode())
    with pytest.raises(UserError, match=rf"is damaged: it has no '{key}'$|has format None"):
        ClusterStore.load(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, saved: Path, name: str, keep: int) -> None:
    data = (saved / name).read_bytes().rstrip()
    path = damaged(tmp_path, saved, name, data[:keep])
    with pytest.raises(UserError, match=f"{name}' is not readable") as caught:
        ClusterStore.load(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_version_is_refused(tmp_path: Path, saved: Path) -> None:
    about = json.loads((saved / "clusters.json").read_text())
    content = json.dumps({**about, "format": "coreinfer.clusters/2"}).encode()
    with pytest.raises(UserError, match=r"format 'coreinfer.clusters/2', expected .*clusters/1"):
        ClusterStore.load(damaged(tmp_path, saved, "clusters.json", content))


def test_a_missing_store_and_half_a_store_are_refused(tmp_path: Path, saved: Path) -> None:
    for path in (tmp_path, tmp_path / "none", saved / "clusters.json"):
        with pytest.raises(UserError, match=r"no cluster store at .*; make one with"):
            ClusterStore.load(path)
    shutil.copytree(saved, tmp_path / "s")
    (tmp_path / "s" / "clusters.safetensors").unlink()
    with pytest.raises(UserError, match="is not readable"):
        ClusterStore.load(tmp_path / "s")


def test_tensors_alone_are_a_store_if_they_come_with_a_description(
    tmp_path: Path, saved: Path
) -> None:
    for name, metadata in (("with", {"about": (saved / FILES[0]).read_text()}), ("without", None)):
        shutil.copytree(saved, tmp_path / name)
        save_file(load_file(saved / FILES[1]), tmp_path / name / FILES[1], metadata)
        assert same(ClusterStore.load(tmp_path / name), random_store())
        (tmp_path / name / FILES[0]).unlink()
    assert same(ClusterStore.load(tmp_path / "with"), random_store())
    with pytest.raises(UserError, match="no cluster store at"):
        ClusterStore.load(tmp_path / "without")


def test_files_of_different_stores_are_refused(tmp_path: Path, saved: Path) -> None:
    random_store(1).save(tmp_path / "other")
    data = (tmp_path / "other" / "clusters.safetensors").read_bytes()
    path = damaged(tmp_path, saved, "clusters.safetensors", data)
    with pytest.raises(UserError, match="its description and its tensors are of different stores"):
        ClusterStore.load(path)


def test_another_model_is_refused_by_name() -> None:
    store = random_store()
    store.require_model("f" * 64, "tiny")
    with pytest.raises(UserError, match=r"made for 'tiny' \(f+\), not for 'other' \(0+\)"):
        store.require_model("0" * 64, "other")


def test_a_store_replaces_a_store_and_nothing_else(tmp_path: Path) -> None:
    random_store(0).save(tmp_path / "s")
    random_store(1).save(tmp_path / "s")
    assert same(ClusterStore.load(tmp_path / "s"), random_store(1))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(UserError, match="exists and is no calibration or cluster store"):
            random_store().save(tmp_path / name)
    with pytest.raises(UserError, match="No such file or directory"):
        random_store().save(tmp_path / "no" / "where")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0}, "alpha of a cluster store"),
        ({"counts": []}, "needs a cluster, and counts and sums of every layer"),
        ({"center": torch.zeros(5)}, "center must be"),
        ({"tokens": torch.zeros(3)}, "tokens must be"),
        ({"documents": torch.zeros(2, dtype=torch.int64)}, "documents must be"),
        ({"encoder": HiddenEncoder(3)}, "probe layer 3 is outside the model"),
        ({"counts": [torch.zeros(3, 10)] * 3}, "counts of layer 0 must be torch.int64"),
        ({"hidden_size": 0}, "hidden_size must be 1 to"),
        ({"centroids": torch.full((3, 4), torch.nan)}, "centroids must be finite numbers"),
        ({"positive_sums": [torch.zeros(3, 9).double()] * 3}, "positive sums of layer 0 must be"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        random_store(**changes)


@given(st.integers(0, 999), st.integers(1, 6))
def test_the_nearest_cluster_has_the_largest_cosine(seed: int, k: int) -> None:
    center = torch.randn(10, generator=torch.Generator().manual_seed(seed + 1))
    store = random_store(seed, k=k, core=True, center=center)
    evidence = prompt(seed).evidence()
    nearest = store.nearest(evidence)
    vector = (evidence.layers[1].counts / evidence.tokens - center).double()
    cosine = [float(vector @ c.double() / vector.norm()) for c in store.centroids]
    assert cosine[nearest.cluster] == pytest.approx(max(cosine), abs=1e-6)
    assert nearest.similarity == pytest.approx(max(cosine), abs=1e-5)
    assert nearest.describe() == {
        "cluster": nearest.cluster,
        "similarity": round(nearest.similarity, 6),
    }


def test_a_store_of_another_sentence_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HiddenEncoder, "encode", lambda _self, _evidence: torch.zeros(1, 7))
    with pytest.raises(UserError, match="gives vectors of 7 numbers, the cluster store has 4"):
        random_store().nearest(prompt().evidence())


@given(st.integers(0, 999), st.integers(1, 4))
def test_the_corpus_is_the_sum_of_its_clusters(seed: int, k: int) -> None:
    store = random_store(seed, k=k)
    whole = store.corpus_statistics()
    for layer in range(3):
        clusters = [store.statistics(cluster)[layer] for cluster in range(k)]
        assert whole[layer].counts.tolist() == sum(c.counts for c in clusters).tolist()
        assert whole[layer].tokens == sum(c.tokens for c in clusters)
        torch.testing.assert_close(whole[layer].positive_sum, sum(c.positive_sum for c in clusters))
