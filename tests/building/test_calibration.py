"""Building a calibration store: what it says, whatever the batches, interruptions and backends."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coreinfer.backends.base import Backend
from coreinfer.backends.hf.session import HfSession
from coreinfer.building import written
from coreinfer.building.settings import CalibrationSettings, memory_needed
from coreinfer.building.training import Trainer
from coreinfer.building.work import WorkFolder
from coreinfer.building.written import write_corpus as write_own
from coreinfer.calibration.store import CalibrationStore
from coreinfer.calibration.sums import BasisSums
from coreinfer.errors import UserError
from coreinfer.jsonl import read_json_lines
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import prefill
from tests.building.corpora import build as build_clusters
from tests.building.corpora import documents, write_corpus
from tests.calibration.stores import build
from tests.interrupting import files, interrupt
from tests.tiny import BOS, tiny_backend

BATCH, DOCUMENTS = 4, 22


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents(DOCUMENTS))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_store_says_what_all_tokens_at_once_say(
    tmp_path: Path, corpus: Path, family: str
) -> None:
    backend = tiny_backend(family)
    store = build(backend, corpus, tmp_path / "s", batch_size=BATCH)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def observe(layer: int, x: Tensor, h: Tensor) -> None:
        seen.setdefault(layer, []).append((x.double(), h.double()))

    for text in documents(DOCUMENTS):
        ids = backend.tokenizer(text).input_ids[:40]
        prefill(backend, [ids], RecordingPlan(observer=observe))
    for layer, made in enumerate(store.predictions):
        x, h = (torch.cat(parts) for parts in zip(*seen[layer], strict=True))
        sums = store.statistics[layer]
        assert sums.tokens == len(x)
        torch.testing.assert_close(sums.square_sum, h.square().sum(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sums.input_sum, x.sum(0), rtol=1e-4, atol=1e-3)
        z = made.features(x.float()).double()
        # the best linear map of these coordinates, a ridge of one token apart
        best = torch.linalg.lstsq(z, h).solution
        least = (h - z @ best).square().sum(0)
        left = made.residual(x.float(), h.float()).double().square().sum(0)
        assert sums.residual_sum is not None
        torch.testing.assert_close(sums.residual_sum, left, rtol=1e-3, atol=1e-5)
        assert (left.sum() - least.sum()) / h.var(0, correction=0).sum() / len(h) < 1e-3
        assert left.sum() < 0.9 * (h - h.mean(0)).square().sum()  # it does predict


def test_batches_do_not_matter(tmp_path: Path, corpus: Path) -> None:
    one = build(tiny_backend(), corpus, tmp_path / "one", batch_size=1)
    two = build(tiny_backend(), corpus, tmp_path / "two", batch_size=7)
    for a, b in zip(one.predictions, two.predictions, strict=True):
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        h = torch.zeros(5, 48)
        torch.testing.assert_close(a.residual(x, h), b.residual(x, h), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(
        one.layer_errors.errors, two.layer_errors.errors, rtol=0.05, atol=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 8, 16])
def test_the_basis_is_of_all_lengths_whatever_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    # Of 32 batches that are sorted by length, every 32nd is the shortest.
    path = write_corpus(tmp_path / "c.jsonl", ["x" * (2 + i * 7 % 60) for i in range(512)])
    read: list[int] = []

    def stop(sums: BasisSums, _rank: int, _kind: str) -> None:
        read.append(sums.tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(BasisSums, "basis", stop)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_backend(), path, tmp_path / "s", batch_size=batch_size, max_tokens=64,
              basis_tokens=500)  # fmt: skip
    assert read == [pytest.approx(500, rel=0.1)]


def test_every_bad_line_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(['"abc cab"', "{broken", '"xyz zyx"', '{"title": 1}', '"123 321"']))
    problems: list[str] = []
    store = build(tiny_backend(), path, tmp_path / "s", on_skip=problems.append)
    assert [f"line {n} " in one for n, one in zip((2, 4), problems, strict=True)] == [True] * 2
    assert store.corpus["documents"] == 3


def test_too_short_documents_are_refused_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_corpus(tmp_path / "c.jsonl", ["abc", "ab"])
    interrupt(monkeypatch, HfSession, "prefill", 0)
    with pytest.raises(UserError, match="has no document of 4 tokens or more"):
        build(tiny_backend(), path, tmp_path / "s")
    write_corpus(path, ["abcde"])
    asked = {"train_steps": 1, "differentiable": tiny_backend()}
    with pytest.raises(UserError, match="no document has the 8 tokens that training needs"):
        build(tiny_backend(), path, tmp_path / "s", **asked)


def test_progress_is_in_documents_also_where_it_goes_on(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(WorkFolder, "is_due", property(lambda _self: True))
    with monkeypatch.context() as patched:
        interrupt(patched, HfSession, "prefill", 4)  # of them the first asks for the anatomy
        with pytest.raises(KeyboardInterrupt):
            build(tiny_backend(), corpus, tmp_path / "s", batch_size=BATCH)
    notes: list[str] = []
    build(
        tiny_backend(), corpus, tmp_path / "s", batch_size=BATCH, progress=True,
        on_note=notes.append,
    )  # fmt: skip
    assert "going on with the basis after 12 of 22 documents" in notes
    drawn = re.findall(r"(basis|summing):[^\r]*? (\d+)/(\d+) ", stderr.getvalue())
    for what, first in (("basis", 12), ("summing", 0)):
        done = [(int(n), total) for name, n, total in drawn if name == what]
        assert (done[0], done[-1]) == ((first, "22"), (22, "22"))


def test_what_is_built_is_written(tmp_path: Path, corpus: Path) -> None:
    store = build(tiny_backend(), corpus, tmp_path / "s")
    read = CalibrationStore.load(tmp_path / "s")
    assert read.describe() == store.describe()
    assert read.corpus["documents"] == DOCUMENTS
    assert read.model_fingerprint == tiny_backend().fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]  # the work folder is gone


def test_what_a_killed_save_has_left_is_removed_and_what_others_write_is_not(
    tmp_path: Path, corpus: Path
) -> None:
    out = tmp_path / "s"
    build_clusters(tiny_backend(), corpus, out)
    for killed in (tmp_path / ".s", out / ".calibration.safetensors", out / ".clusters.json"):
        killed.with_name(f"{killed.name}.abcd_123.partial").mkdir()
    build(tiny_backend(), corpus, out)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert [p.name for p in out.glob(".*")] == [".clusters.json.abcd_123.partial"]
    build_clusters(tiny_backend(), corpus, out)
    assert not list(out.glob(".*"))
    assert CalibrationStore.load(out).rank == 6


def test_layer_errors_fall_to_nothing(tmp_path: Path, corpus: Path) -> None:
    errors = build(tiny_backend(), corpus, tmp_path / "s").layer_errors
    assert errors.keeps[-1] == 1.0
    assert errors.errors.shape == (3, len(errors.keeps))
    assert (errors.errors[:, -1] == 0).all()
    assert (errors.errors[:, 0] > 0).all()


@pytest.mark.parametrize("after", [0, 1, 2, 6, 7, 9, 13, 14, 16])
def test_it_goes_on_to_the_same_store(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    build(tiny_backend(), corpus, tmp_path / "whole", batch_size=BATCH)
    # A checkpoint after every batch, however long writing one takes on a busy machine.
    monkeypatch.setattr(WorkFolder, "is_due", property(lambda _self: True))
    with monkeypatch.context() as patched:
        interrupt(patched, HfSession, "prefill", after)
        with pytest.raises(KeyboardInterrupt):
            build(tiny_backend(), corpus, tmp_path / "store", batch_size=BATCH)
    assert not (tmp_path / "store").exists()
    notes: list[str] = []
    build(tiny_backend(), corpus, tmp_path / "store", batch_size=BATCH, on_note=notes.append)
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    if after > 9:
        assert any(note.startswith("going on") for note in notes)


def test_other_settings_start_anew(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_backend(), corpus, tmp_path / "whole", rank=3)
    with monkeypatch.context() as patched:
        interrupt(patched, HfSession, "prefill", 5)
        with pytest.raises(KeyboardInterrupt):
            build(tiny_backend(), corpus, tmp_path / "store")
    notes: list[str] = []
    build(tiny_backend(), corpus, tmp_path / "store", rank=3, on_note=notes.append)
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    assert any("another rank" in note for note in notes)


def test_the_memory_is_said_beforehand_and_grows_with_the_model(
    tmp_path: Path, corpus: Path
) -> None:
    notes: list[str] = []
    build(tiny_backend(), corpus, tmp_path / "s", on_note=notes.append)
    assert notes[0].startswith("calibration takes up to")
    llama_7b = [(11008, 4096)] * 32
    assert memory_needed(llama_7b, 256) < 6e9
    assert memory_needed(llama_7b, 256) > memory_needed(llama_7b, 64) > 4e9


def test_a_model_writes_the_same_corpus_in_one_go_or_two(tmp_path: Path) -> None:
    backend = tiny_backend()
    whole, parts = tmp_path / "a", tmp_path / "b"
    write_own(backend, whole, 256 * 10, 5, progress=False)
    write_own(backend, parts, 256 * 3, 5, progress=False)
    with parts.open("ab") as file:
        file.write(b'{"text": "cut o')  # killed here
    write_own(backend, parts, 256 * 10, 5, progress=False)
    assert whole.read_bytes() == parts.read_bytes()
    texts = [value["text"] for _, value in read_json_lines(whole)]
    assert len(texts) == 10 == len(set(texts))
    other = tmp_path / "c"
    write_own(backend, other, 256, 6, progress=False)
    assert other.read_bytes() not in whole.read_bytes()


def test_no_more_is_written_than_is_asked_for(tmp_path: Path) -> None:
    backend = tiny_backend()
    write_own(backend, tmp_path / "a", 256 * 2, 5, progress=False)
    few = (tmp_path / "a").read_bytes()
    write_own(backend, tmp_path / "a", 256 * 3, 5, progress=False)
    write_own(backend, tmp_path / "a", 256 * 2, 5, progress=False)
    assert (tmp_path / "a").read_bytes() == few


def test_what_another_model_or_seed_wrote_is_no_corpus_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, backend = tmp_path / "s", tiny_backend()
    notes: list[str] = []
    build(backend, None, tmp_path / "whole", seed=4)
    for other in (tiny_backend(seed=1), tiny_backend()):  # another model, then another seed
        interrupt_after_writing(other, out, monkeypatch)
    build(backend, None, out, seed=4, on_note=notes.append)
    assert files(out) == files(tmp_path / "whole")
    assert sum("was written with another model, backend, dtype or seed" in n for n in notes) == 1


def test_what_this_run_wrote_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tiny_backend()
    interrupt_after_writing(backend, tmp_path / "s", monkeypatch)
    monkeypatch.setattr(written, "_batch", None)  # nothing is written again
    build(backend, None, tmp_path / "s")


def interrupt_after_writing(backend: Backend, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, WorkFolder, "load", 0)
        with pytest.raises(KeyboardInterrupt):
            build(backend, None, out)
    assert len(list(out.with_name(f".{out.name}.calibration").glob("corpus-*.jsonl"))) == 1


def test_tokens_that_the_model_has_not_begin_no_document(tmp_path: Path) -> None:
    backend = tiny_backend()
    backend.tokenizer.add_tokens([f"<{number}>" for number in range(10_000)])
    write_own(backend, tmp_path / "a", 256 * 2, 0, progress=False)
    assert sum(1 for _ in read_json_lines(tmp_path / "a")) == 2


def test_a_basis_may_be_that_of_the_inputs_alone(tmp_path: Path) -> None:
    backend, corpus = tiny_backend(), write_corpus(tmp_path / "c.jsonl", documents(8))
    usual, other = (
        build(backend, corpus, tmp_path / kind, basis=kind) for kind in ("regression", "inputs")
    )
    for one, two in zip(usual.predictions, other.predictions, strict=True):
        assert one.basis.shape == two.basis.shape
        assert not torch.allclose(one.basis, two.basis)
    # It says less of the neurons, weighed as the basis was chosen; never more but by the ridge.
    left = [sum(float(s.residual_sum.sum()) for s in store.statistics) for store in (usual, other)]
    assert left[0] < 1.05 * left[1]
    assert CalibrationStore.load(tmp_path / "inputs").corpus["basis"] == "inputs"


def test_a_store_needs_no_corpus(tmp_path: Path) -> None:
    store = build(tiny_backend(), None, tmp_path / "s", seed=3)
    assert store.corpus["name"] == "written by the model"
    assert store.corpus["seed"] == 3
    assert store.tokens > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"basis": "pca"}, "no basis 'pca'; there is regression, inputs"),
        ({"basis_tokens": 0}, "basis_tokens"),
        ({"error_documents": 0}, "error_documents"),
        ({"own_tokens": 0}, "own_tokens"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CalibrationSettings(**options)


def test_documents_as_long_as_the_context_are_read(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl", ["abc " * 300] * 2)
    store = build(tiny_backend(), path, tmp_path / "s", max_tokens=512)  # the context
    assert store.tokens == 2 * 511


def test_a_rank_above_the_width_is_the_width(tmp_path: Path, corpus: Path) -> None:
    assert build(tiny_backend(), corpus, tmp_path / "s", rank=999).rank == 32


def test_a_place_of_something_else_is_refused_before_any_work(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(UserError, match="choose another path"):
        build(tiny_backend(), corpus, tmp_path / "s")


def test_a_corpus_of_nothing_but_single_tokens_is_refused(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl", ["a", "b"])
    with pytest.raises(UserError, match="no document"):
        build(tiny_backend(), path, tmp_path / "s")


def test_a_bos_token_is_not_learnt_from() -> None:
    backend = tiny_backend()
    shown: list[int] = []
    plan = RecordingPlan(observer=lambda _layer, x, _h: shown.append(len(x)))
    prefill(backend, [[BOS, 5, 6, 7]], plan)
    assert shown == [3, 3, 3]


def residual_of(store: CalibrationStore, layer: int) -> Tensor:
    left = store.statistics[layer].residual_sum
    assert left is not None
    return left


def test_training_is_a_stage_that_goes_on(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tiny_backend()
    plain = build(backend, corpus, tmp_path / "plain")
    asked = {"train_steps": 4, "differentiable": backend}
    whole = build(backend, corpus, tmp_path / "whole", **asked)
    for a, b in zip(plain.predictions, whole.predictions, strict=True):
        assert torch.equal(a.basis, b.basis)
        assert not torch.equal(a.coefficients, b.coefficients)
        assert not torch.equal(residual_of(plain, 0), residual_of(whole, 0))
    seen: dict[int, Tensor] = {}

    def observe(layer: int, x: Tensor, h: Tensor) -> None:
        left = whole.predictions[layer].residual(x, h).double().square().sum(0)
        seen[layer] = seen.get(layer, 0) + left

    for text in documents(DOCUMENTS):
        prefill(backend, [backend.tokenizer(text).input_ids[:40]], RecordingPlan(observer=observe))
    for layer, left in seen.items():
        torch.testing.assert_close(residual_of(whole, layer), left, rtol=1e-4, atol=1e-5)
    with monkeypatch.context() as patch:
        interrupt(patch, Trainer, "step", 2)
        with pytest.raises(KeyboardInterrupt):
            build(backend, corpus, tmp_path / "cut", **asked)
    rest = build(backend, corpus, tmp_path / "cut", **asked)
    for a, b in zip(whole.predictions, rest.predictions, strict=True):
        assert torch.equal(a.coefficients, b.coefficients)
        assert torch.equal(residual_of(whole, 0), residual_of(rest, 0))
    assert torch.equal(whole.layer_errors.errors, rest.layer_errors.errors)
    assert rest.corpus["train_steps"] == 4
