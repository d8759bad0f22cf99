"""The calibration store: what is saved is read, and nothing damaged is."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from coreinfer.calibration.store import SUMS, CalibrationStore
from coreinfer.core.layer_errors import LayerErrors
from coreinfer.errors import UserError
from coreinfer.semantics.store import ClusterStore
from tests.calibration.stores import random_store
from tests.interrupting import files
from tests.semantics.stores import random_store as random_clusters

FILE = "calibration.safetensors"


def same(a: CalibrationStore, b: CalibrationStore) -> bool:
    def tensors(store: CalibrationStore) -> list[torch.Tensor]:
        made = [t for p in store.predictions for t in vars(p).values()]
        sums = [getattr(s, name) for s in store.statistics for name in SUMS]
        return [store.layer_errors.errors, *made, *sums]

    equal = all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    return equal and a.describe() == b.describe()


@given(st.integers(0, 99), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4))
def test_what_is_saved_is_read(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sizes: list[int], rank: int
) -> None:
    store = random_store(seed, sizes=sizes, rank=rank)
    path = tmp_path_factory.mktemp("s") / "store"
    store.save(path)
    read = CalibrationStore.load(path)
    assert same(read, store)
    assert read.num_neurons == tuple(sizes)
    assert read.rank == rank
    assert read.tokens == 9
    described = json.loads((path / "calibration.json").read_text())
    assert described == json.loads(json.dumps(store.describe()))


def test_a_store_takes_the_place_of_another_and_lives_beside_clusters(tmp_path: Path) -> None:
    clusters = random_clusters()
    clusters.save(tmp_path / "s")
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    for seed in (0, 1):
        random_store(seed).save(tmp_path / "s")
        assert same(CalibrationStore.load(tmp_path / "s"), random_store(seed))
    assert {name: (tmp_path / "s" / name).read_bytes() for name in before} == before
    assert len(list((tmp_path / "s").iterdir())) == len(before) + 2


def test_clusters_live_beside_a_store_whichever_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    random_store().save(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for seed in (0, 1):
        random_clusters(seed).save(folder)
        assert ClusterStore.load(folder).describe() == random_clusters(seed).describe()
        assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(list(folder.iterdir())) == len(before) + 2


@pytest.mark.parametrize(
    ("make", "load"),
    [(random_store, CalibrationStore.load), (random_clusters, ClusterStore.load)],
    ids=["calibration", "clusters"],
)
def test_at_every_moment_of_a_save_the_old_store_is_there_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, load: Any
) -> None:
    folder, old, new = tmp_path / "s", make(0), make(1)
    for store, name in ((old, "s"), (old, "old"), (new, "new")):
        store.save(tmp_path / name)
    moments: list[str] = []

    def look() -> None:
        copy = tmp_path / f"moment-{len(moments)}"  # as it is if the run is killed now
        shutil.copytree(folder, copy)
        store = load(copy)
        store.save(tmp_path / "found")
        found = files(tmp_path / "found")
        moments.extend(name for name in ("old", "new") if files(tmp_path / name) == found)
        store.save(copy)  # what a killed run has left can be written over
        assert load(copy).describe() == store.describe()

    def watched(change: Any) -> Any:
        def changing(*args: Any, **options: Any) -> Any:
            if folder in args[0].parents:
                look()
            return change(*args, **options)

        return changing

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", watched(Path.replace))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        new.save(folder)
    look()
    # Before the old description goes, before and after each of the two renames.
    assert moments == ["old", "old", "new", "new"]


def test_something_else_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no calibration or cluster store"):
        random_store().save(tmp_path / "s")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "store"
    random_store().save(path)
    return path


@given(
    cut=st.integers(0, 5000), flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)))
)
def test_damaged_bytes_are_refused_or_harmless(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray((saved / FILE).read_bytes())
    for place, change in flips:
        content[place % len(content)] ^= change
    (folder / FILE).write_bytes(content[: len(content) - cut])
    with contextlib.suppress(UserError):
        CalibrationStore.load(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("basis.1", lambda t: t[:-1], "basis of layer 1 must be"),
        ("coefficients.0", lambda t: t.double(), "coefficients of layer 0 must be"),
        ("counts.2", lambda t: t[1:], "counts of layer 2 must be"),
        ("residual_sum.0", lambda t: t * float("nan"), "must be finite"),
        ("errors", lambda t: t.flip(1), "must not grow"),
        ("errors", lambda t: -t, "not negative"),
        ("errors", lambda t: t[1:], "all parts of every layer"),
        ("input_mean.0", None, "has no 'input_mean.0'"),
    ],
)
def test_a_wrong_tensor_is_named(
    saved: Path, tmp_path: Path, name: str, change: object, message: str
) -> None:
    with safe_open(saved / FILE, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()  # type: ignore[operator]
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(UserError, match=message):
        CalibrationStore.load(tmp_path)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"format": "coreinfer.calibration/9"}, "has format"),
        ({"num_layers": 4}, "has no"),
        ({"num_layers": "x"}, "is damaged"),
        ({"tokens": 0}, "tokens of layer 0"),
        ({"alpha": 7}, "alpha"),
        ({"keeps": [0.5, 0.2, 1.0]}, "keeps must ascend"),
    ],
)
def test_a_wrong_description_is_refused(
    saved: Path, tmp_path: Path, about: dict[str, object], message: str
) -> None:
    with safe_open(saved / FILE, framework="pt") as opened:
        described = json.loads(opened.metadata()["about"])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / FILE, {"about": json.dumps(described | about)})
    with pytest.raises(UserError, match=message):
        CalibrationStore.load(tmp_path)


def test_a_missing_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="coreinfer calibrate"):
        CalibrationStore.load(tmp_path / "none")


def test_the_description_for_people_is_not_read(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "s")
    (tmp_path / "s" / "calibration.json").write_text("{")
    assert same(CalibrationStore.load(tmp_path / "s"), random_store())


def test_another_model_is_refused_by_name() -> None:
    store = random_store(model="one")
    store.require_model("f" * 64, "one")
    with pytest.raises(UserError, match=r"made for 'one' .* not for 'two'"):
        store.require_model("0" * 64, "two")


def test_a_fork_does_not_copy_it() -> None:
    store = random_store()
    assert copy.deepcopy(store) is store


def test_parts_of_other_models_do_not_go_together() -> None:
    with pytest.raises(UserError, match="all parts of every layer"):
        replace(random_store(), statistics=random_store(sizes=(10, 10)).statistics)
    with pytest.raises(UserError, match="counts of layer 0"):
        replace(random_store(), statistics=random_store(sizes=(9, 9, 9)).statistics)


@pytest.mark.parametrize(
    ("keeps", "errors", "message"),
    [
        ((), torch.zeros(2, 0).double(), "keeps must ascend"),
        ((0.0, 1.0), torch.zeros(2, 2).double(), "keeps must ascend"),
        ((0.5, 1.0), torch.zeros(2, 3).double(), "must be float64"),
        ((0.5, 1.0), torch.zeros(2, 2), "must be float64"),
        ((0.5, 1.0), torch.tensor([[1.0, 2.0]]).double(), "must not grow"),
        ((0.5, 1.0), torch.tensor([[float("nan"), 0.0]]).double(), "finite"),
    ],
)
def test_layer_errors_are_what_they_say(
    keeps: tuple[float, ...], errors: torch.Tensor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        LayerErrors(keeps, errors)
