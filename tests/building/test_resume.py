"""An interrupted build goes on when it is started again, to the same store to the last bit."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from coreinfer.backends.hf.session import HfSession
from coreinfer.building import work as work_module
from coreinfer.building.work import WorkFolder, work_folder
from coreinfer.errors import UserError
from coreinfer.semantics.encoders import CoreEncoder
from coreinfer.semantics.store import ClusterStore
from tests.building.corpora import build, documents, write_corpus
from tests.interrupting import files, interrupt
from tests.tiny import tiny_backend

BATCH = 4
DOCUMENTS = 22
BATCHES = 6  # prefills a pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents(DOCUMENTS))


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> dict[str, bytes]:
    out = corpus.parent / "whole"
    build(tiny_backend(), corpus, out, batch_size=BATCH)
    return files(out)


@pytest.mark.parametrize("after", range(2 * BATCHES))
def test_it_goes_on_after_any_prefill(
    tmp_path: Path,
    corpus: Path,
    uninterrupted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    backend, out = tiny_backend(), tmp_path / "store"
    half_done(tmp_path, corpus, monkeypatch, after)
    assert not out.exists()
    assert (tmp_path / ".store.work").exists() == (after > 0)
    notes: list[str] = []
    prefills = 0
    original = HfSession.prefill

    def counted(*args: Any) -> Any:
        nonlocal prefills
        prefills += 1
        return original(*args)

    monkeypatch.setattr(HfSession, "prefill", counted)
    build(backend, corpus, out, batch_size=BATCH, on_note=notes.append)
    assert files(out) == uninterrupted
    assert prefills == 2 * BATCHES - after  # nothing is done twice
    if after == 0:
        assert notes == []
    elif after < BATCHES:
        assert notes == [f"going on after embedding {after * BATCH} documents"]
    else:
        counted_already = (after - BATCHES) * BATCH
        assert notes[0] == f"going on with {DOCUMENTS} documents embedded"
        assert notes[1:] == [f"going on after counting {counted_already} documents"] * (
            counted_already > 0
        )
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("seed", range(3))
def test_it_goes_on_after_any_number_of_interruptions(
    tmp_path: Path,
    corpus: Path,
    uninterrupted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    draw = random.Random(seed)
    out, runs = tmp_path / "store", 0
    while not out.exists():
        runs += 1
        with monkeypatch.context() as patch:
            places = [(HfSession, "prefill"), (WorkFolder, "save")]
            interrupt(patch, *draw.choice(places), draw.randint(1, 4))
            try:
                build(tiny_backend(), corpus, out, batch_size=BATCH)
            except KeyboardInterrupt:
                continue
    assert runs > 2
    assert files(out) == uninterrupted


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from coreinfer.building import work
from tests.building.corpora import build
from tests.tiny import tiny_backend

torch.set_num_threads(1)
work.SHARE = 0
corpus, out = Path(sys.argv[1]), Path(sys.argv[2])
backend = tiny_backend()
kill_at = [int(n) for n in sys.argv[3].split(",")]
replaced = Path.replace

for when in kill_at:
    if (child := os.fork()) == 0:
        renames = 0
        def dying(self, target):
            # Half of them die with a checkpoint written and not yet in its place.
            global renames
            renames += 1
            if renames == when and when % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            made = replaced(self, target)
            if renames == when:
                os.kill(os.getpid(), signal.SIGKILL)
            return made
        Path.replace = dying
        build(backend, corpus, out, batch_size=4)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of one process")
def test_it_goes_on_after_being_killed(
    tmp_path: Path, corpus: Path, uninterrupted: dict[str, bytes]
) -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", KILLED, corpus, tmp_path / "store", "1,6,5,4,1,99"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(code) for code in result.stdout.split()] == [-signal.SIGKILL] * 5 + [0]
    assert files(tmp_path / "store") == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def half_done(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, after: int, **options: Any
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, HfSession, "prefill", after)
        with pytest.raises(KeyboardInterrupt):
            build(tiny_backend(), corpus, tmp_path / "store", batch_size=BATCH, **options)


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"max_tokens": 16}, "the vectors in .* with another max_tokens; making them anew"),
        ({"encoder": CoreEncoder(1)}, "the vectors in .* with another alpha, encoder;"),
        ({"batch_size": 5}, "the vectors in .* with another batch_size;"),
        ({"k": 2}, "the clusters in .* with another k;"),
        ({"seed": 1}, "the clusters in .* with another seed;"),
        ({"alpha": 0.2}, "the counts in .* with another alpha;"),
    ],
)
def test_another_command_starts_anew_and_says_so(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    note: str,
) -> None:
    half_done(tmp_path, corpus, monkeypatch, BATCHES + 2)
    options = {"batch_size": BATCH, **changed}
    notes: list[str] = []
    build(tiny_backend(), corpus, tmp_path / "store", on_note=notes.append, **options)
    assert sum(re.search(note, line) is not None for line in notes) == 1
    assert sum("anew" in line for line in notes) == 1
    build(tiny_backend(), corpus, tmp_path / "fresh", **options)
    assert files(tmp_path / "store") == files(tmp_path / "fresh")


def test_another_model_or_corpus_starts_anew(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    options: dict[str, Any] = {"batch_size": BATCH, "on_note": notes.append}
    half_done(tmp_path, corpus, monkeypatch, 3)
    build(tiny_backend(seed=1), corpus, tmp_path / "store", **options)
    half_done(tmp_path, corpus, monkeypatch, 3)
    other = write_corpus(tmp_path / "other.jsonl", documents(DOCUMENTS, seed=1))
    build(tiny_backend(), other, tmp_path / "store", **options)
    assert ["another model_fingerprint;" in notes[0], "another corpus;" in notes[1]] == [True] * 2


def test_too_few_documents_for_k_are_refused_before_any_is_embedded(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, HfSession, "prefill", 0)
    with pytest.raises(UserError, match=f"cannot make 50 clusters of {DOCUMENTS} documents"):
        build(tiny_backend(), corpus, tmp_path / "store", k=50)


@pytest.mark.parametrize("name", ["vectors", "clusters", "counts"])
@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
def test_a_damaged_checkpoint_is_made_anew(
    tmp_path: Path,
    corpus: Path,
    uninterrupted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: str,
) -> None:
    half_done(tmp_path, corpus, monkeypatch, BATCHES + 2)
    file = tmp_path / ".store.work" / f"{name}.safetensors"
    data = file.read_bytes()
    file.write_bytes(
        {"empty": b"", "half": data[: len(data) // 2], "garbage": b"\xff" * 99}[damage]
    )
    notes: list[str] = []
    build(tiny_backend(), corpus, tmp_path / "store", batch_size=BATCH, on_note=notes.append)
    assert f"is damaged; making the {name} anew" in notes[-1]
    assert files(tmp_path / "store") == uninterrupted


def test_a_vector_file_that_lost_its_end_is_made_anew(
    tmp_path: Path,
    corpus: Path,
    uninterrupted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half_done(tmp_path, corpus, monkeypatch, 3)
    file = tmp_path / ".store.work" / "vectors.f32"
    file.write_bytes(file.read_bytes()[:-4])
    build(tiny_backend(), corpus, tmp_path / "store", batch_size=BATCH)
    assert files(tmp_path / "store") == uninterrupted


def test_two_runs_never_share_a_work_folder(tmp_path: Path, corpus: Path) -> None:
    work = tmp_path / ".store.work"
    work.mkdir()
    with FileLock(work / "lock"), pytest.raises(UserError, match="another run is at work in"):
        build(tiny_backend(), corpus, tmp_path / "store")
    assert work.exists()
    build(tiny_backend(), corpus, tmp_path / "store")
    assert not work.exists()


def test_a_work_folder_is_locked_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, removed = tmp_path / "w", shutil.rmtree
    refused: list[str] = []

    def watched(path: Path, **options: Any) -> None:
        with pytest.raises(UserError, match="another run is at work") as caught, opened(place):
            pass
        refused.append(str(caught.value))
        removed(path, **options)

    with opened(place):
        monkeypatch.setattr(work_module.shutil, "rmtree", watched)
    assert len(refused) == 1
    assert not place.exists()


def test_a_run_that_locks_a_folder_as_it_is_removed_makes_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, acquire = tmp_path / "w", FileLock.acquire
    times = 0

    def late(self: FileLock, **options: Any) -> Any:
        nonlocal times
        times += 1
        taken = acquire(self, **options)
        if times == 1:  # the run before had it locked when this one opened it, and now removes it
            shutil.rmtree(place)
        return taken

    monkeypatch.setattr(FileLock, "acquire", late)
    with opened(place) as work:
        assert work.path.is_dir()
        with pytest.raises(UserError, match="another run is at work"), opened(place):
            pass
    assert not place.exists()


def opened(place: Path) -> AbstractContextManager[WorkFolder]:
    return work_folder(place, ["stage"], lambda _note: None, 0.0)


def test_a_store_that_is_there_stays_until_the_new_one_is_whole(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    old = build(tiny_backend(), corpus, out, k=2, batch_size=BATCH)
    half_done(tmp_path, corpus, monkeypatch, BATCHES + 2)
    assert torch.equal(ClusterStore.load(out).tokens, old.tokens)
    build(tiny_backend(), corpus, out, batch_size=BATCH)
    assert ClusterStore.load(out).num_clusters == 3


def test_checkpoints_are_no_more_frequent_than_asked_for(tmp_path: Path, corpus: Path) -> None:
    saved: list[str] = []
    original = WorkFolder.save
    with pytest.MonkeyPatch.context() as patch:

        def counted(self: WorkFolder, stage: str, *args: Any) -> None:
            saved.append(stage)
            original(self, stage, *args)

        patch.setattr(WorkFolder, "save", counted)
        build(tiny_backend(), corpus, tmp_path / "a", batch_size=BATCH, checkpoint_seconds=3600)
        assert saved == ["vectors", "clusters"]  # what is complete is always worth it
        saved.clear()
        build(tiny_backend(), corpus, tmp_path / "b", batch_size=BATCH)
        assert saved == ["vectors"] * (BATCHES + 1) + ["clusters"] + ["counts"] * BATCHES
