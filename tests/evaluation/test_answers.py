"""Answers that are kept: round trips, damage, and what their names depend on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.evaluation.answers import Answer, Answers, key_of

SETTINGS = {"model": "tiny", "dtype": "float32"}
ANSWERS: dict[str, Answer] = {
    "a": {"logprob": -1.2345678901234567, "greedy": True, "tokens": 3},
    "b": {"text": "two\nlines, \u00e4 \U0001f600", "tokens": 1},
}


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*.jsonl")
    return path


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    Answers(tmp_path / "new" / "folder", SETTINGS).add(ANSWERS)
    found = Answers(tmp_path / "new" / "folder", SETTINGS)
    assert {key: found[key] for key in ANSWERS} == ANSWERS
    assert len(found) == 2
    assert "c" not in found


def test_answers_are_added_once(tmp_path: Path) -> None:
    answers = Answers(tmp_path, SETTINGS)
    answers.add(ANSWERS)
    before = the_file(tmp_path).read_bytes()
    answers.add({"a": {"logprob": 0.0}})
    assert the_file(tmp_path).read_bytes() == before
    assert answers["a"] == ANSWERS["a"]


def test_other_settings_have_another_file(tmp_path: Path) -> None:
    Answers(tmp_path, SETTINGS).add(ANSWERS)
    assert "a" not in Answers(tmp_path, {**SETTINGS, "dtype": "int8"})
    assert "a" in Answers(tmp_path, dict(reversed(SETTINGS.items())))  # the order says nothing


def test_without_a_folder_answers_are_in_memory() -> None:
    answers = Answers()
    answers.add(ANSWERS)
    assert answers["b"] == ANSWERS["b"]


@given(st.data())
def test_a_damaged_file_loses_answers_but_tells_none_wrong(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    Answers(folder, SETTINGS).add(ANSWERS)
    path = the_file(folder)
    raw = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["cut", "flip", "garbage"])):
        case "cut":
            del raw[data.draw(st.integers(0, len(raw) - 1)) :]
        case "flip":
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        case _:
            raw += data.draw(st.binary(max_size=40))
    path.write_bytes(raw)
    found = Answers(folder, SETTINGS)
    assert all(found[key] == ANSWERS[key] for key in ANSWERS if key in found)
    found.add(ANSWERS)  # and what is added next can be read
    again = Answers(folder, SETTINGS)
    assert {key: again[key] for key in ANSWERS} == ANSWERS


def test_a_line_of_another_shape_is_no_answer(tmp_path: Path) -> None:
    Answers(tmp_path, SETTINGS).add({})
    with the_file(tmp_path).open("a") as file:
        for line in ([1, 2], "text", {"key": "a"}, {"key": "a", "answer": 3, "check": "no"}):
            file.write(json.dumps(line) + "\n")
    assert len(Answers(tmp_path, SETTINGS)) == 0


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot access"):
        Answers(tmp_path / "file", SETTINGS)


def test_keys_tell_values_apart() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    different = [key_of("ab"), key_of("a", "b"), key_of(["a", "b"]), key_of("a", ["b"]), key_of(1)]
    assert len(set(different)) == 5
    assert key_of("\ud800")  # half a character that a tokenizer's text may hold
