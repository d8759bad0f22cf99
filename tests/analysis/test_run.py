"""A run: what is written, what is kept of an interrupted one, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from coreinfer.analysis import charts, run
from coreinfer.analysis.run import QUESTIONS, Place, analyze, questions_named
from coreinfer.analysis.sections import Section
from coreinfer.analysis.settings import Settings
from coreinfer.errors import UserError
from tests.analysis.sample import SMALL, SOURCES, Counting, loads
from tests.calibration.stores import random_store as random_calibration
from tests.semantics.stores import random_store
from tests.tiny import tiny_backend

TINY = {"tiny": loads(tiny_backend())}


def ask(question: Counting, out: Path, settings: Settings = SMALL, seed: int = 0) -> list[Section]:
    models = {"tiny": loads(tiny_backend(seed=seed))}
    return analyze(models, [question], SOURCES, settings, out)


def test_a_folder_gets_the_page_the_data_and_the_drawing(tmp_path: Path) -> None:
    (section,) = ask(Counting(), tmp_path / "out")
    assert section.findings == ("asked of tiny-llama",)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    stem = "counting-tiny-llama-numbers"
    assert names == {"report.html", f"{stem}.csv", f"{stem}.svg", "work"}
    csv = (tmp_path / "out" / f"{stem}.csv").read_bytes().decode("utf-8")
    assert csv == section.figures[0].table.to_csv()
    assert "How often &lt;asked&gt;" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_a_page_gets_its_files_beside_it(tmp_path: Path) -> None:
    ask(Counting(), tmp_path / "mine.html")
    names = {path.name for path in tmp_path.iterdir()}
    stem = "mine-counting-tiny-llama-numbers"
    assert names == {"mine.html", f"{stem}.csv", f"{stem}.svg", "mine-work"}


def test_an_answer_is_kept_for_exactly_its_settings(tmp_path: Path) -> None:
    question = Counting()
    first = ask(question, tmp_path)
    assert ask(question, tmp_path) == first
    assert question.asked == 1
    ask(question, tmp_path, dataclasses.replace(SMALL, keep=0.3))
    assert question.asked == 2
    ask(question, tmp_path, seed=1)  # another model
    assert question.asked == 3
    analyze(TINY, [question], SOURCES[::-1], SMALL, tmp_path)
    assert question.asked == 4
    other = dataclasses.replace(SOURCES[0], identity={"n": 41})
    analyze(TINY, [question], [other, SOURCES[1]], SMALL, tmp_path)
    assert question.asked == 5
    ask(question, tmp_path)
    assert question.asked == 5


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    first, second = Counting(), Counting(interrupt)
    first.name, second.name = "first", "second"  # type: ignore[misc]
    with pytest.raises(KeyboardInterrupt):
        analyze(TINY, [first, second], SOURCES, SMALL, tmp_path)
    assert "first-tiny-llama" in (tmp_path / "report.html").read_text(encoding="utf-8")
    again = Counting()
    again.name = "second"  # type: ignore[misc]
    sections = analyze(TINY, [first, again], SOURCES, SMALL, tmp_path)
    assert [section.question for section in sections] == ["first", "second"]
    assert (first.asked, again.asked) == (1, 1)


@pytest.mark.parametrize(
    ("name", "change", "window"),
    [
        ("grid", {"prompt_tokens": 500, "continuation_tokens": 13}, r"500 \+ 13"),
        ("prompt-length", {"lengths": (2, 510)}, r"510 \+ 5"),
        ("layers", {"lengths": (2, 449)}, r"449 \+ 64"),
        ("semantics", {"prompt_tokens": 508}, r"508 \+ 5"),
        ("robustness", {"long_tokens": 500}, r"24 \+ 492"),
    ],
)
def test_windows_that_the_model_cannot_read_are_refused_before_anything_is_asked(
    tmp_path: Path, name: str, change: dict[str, Any], window: str
) -> None:
    settings, first = dataclasses.replace(SMALL, **change), Counting()
    message = f"question '{name}': windows of {window} tokens are longer than the 512 that tiny"
    with pytest.raises(UserError, match=message):
        analyze(TINY, [QUESTIONS[name], first], SOURCES, settings, tmp_path)
    assert first.asked == 0
    if name == "robustness":  # who does not ask that is not held up by it
        analyze(TINY, [first], SOURCES, settings, tmp_path)


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path) -> None:
    question, told = Counting(), list[str]()
    ask(question, tmp_path)
    (kept,) = (tmp_path / "work").glob("*.json")
    for damage in (b"{}", b"\xff\xfe", kept.read_bytes()[:-9]):
        kept.write_bytes(damage)
        analyze(TINY, [question], SOURCES, SMALL, tmp_path, on_progress=told.append)
    assert question.asked == 4
    assert sum("is damaged; asking again" in line for line in told) == 3


def test_models_are_asked_in_turn_and_stand_side_by_side(tmp_path: Path) -> None:
    models = {**TINY, "opt": loads(tiny_backend("opt"))}
    one, two = Counting(), Counting()
    two.name = "two"  # type: ignore[misc]
    sections = analyze(models, [one, two], SOURCES, SMALL, tmp_path)
    assert [(s.question, s.subject) for s in sections] == [
        ("counting", "tiny-llama"), ("counting", "tiny-opt"),
        ("two", "tiny-llama"), ("two", "tiny-opt"),
    ]  # fmt: skip


def test_questions_are_named_in_their_order() -> None:
    assert [one.name for one in questions_named(["all"])] == list(QUESTIONS)
    assert [one.name for one in questions_named(["layers", "grid", "layers"])] == ["grid", "layers"]
    with pytest.raises(UserError, match=r"no question 'layer'; did you mean 'layers'\?"):
        questions_named(["grid", "layer"])
    with pytest.raises(UserError, match="no question was asked; there is all, grid"):
        questions_named([])


def test_what_is_missing_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = Counting()
    with pytest.raises(UserError, match="'semantics' needs texts of 2 kinds, got 1; give --text"):
        analyze(TINY, [question, QUESTIONS["semantics"]], SOURCES[:1], SMALL, tmp_path)
    with pytest.raises(UserError, match="two texts are called 'code'"):
        analyze(TINY, [question], [SOURCES[1], SOURCES[1]], SMALL, tmp_path)
    with pytest.raises(UserError, match="dense layer 9 is outside tiny-llama, which has 0 to 2"):
        ask(question, tmp_path, dataclasses.replace(SMALL, dense_layers=(0, 9)))
    with pytest.raises(UserError, match="there is no such folder"):
        Place.of(tmp_path / "none" / "page.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot access"):
        Place.of(tmp_path / "file")
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'coreinfer\[analyze\]'"):
        ask(question, tmp_path)
    assert question.asked == 0


def test_a_store_for_another_model_is_refused(tmp_path: Path) -> None:
    question = Counting()
    with pytest.raises(UserError, match="store of 'tiny' is for none of the models"):
        analyze(TINY, [question], SOURCES, SMALL, tmp_path, stores=[random_store()])
    other = random_calibration(model="other")
    with pytest.raises(UserError, match="store of 'other' is for none of the models"):
        analyze(TINY, [question], SOURCES, SMALL, tmp_path, calibrations=[other])
    assert question.asked == 0  # nothing is measured for nothing
    with pytest.raises(UserError, match="none of these questions takes a store"):
        analyze({}, [QUESTIONS["beyond"]], [], SMALL, tmp_path, stores=[random_store()])


def test_a_store_is_given_to_its_model(tmp_path: Path) -> None:
    backend = tiny_backend()
    store = random_store(model_fingerprint=backend.fingerprint)
    seen = []

    class Looking(Counting):
        def ask(self, materials):  # type: ignore[no-untyped-def]
            seen.append(materials.store)
            return super().ask(materials)

    analyze({"tiny": loads(backend)}, [Looking()], SOURCES, SMALL, tmp_path, stores=[store])
    assert seen == [store]


def test_a_full_disk_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.Path, "write_text", full)
    with pytest.raises(UserError, match="no space left while writing"):
        ask(Counting(), tmp_path)
