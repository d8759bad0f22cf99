"""Entries that are kept: round trips, damage, and what keys and names depend on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.journal import Entry, Journal, key_of

SETTINGS = {"model": "tiny", "dtype": "float32"}
ENTRIES: dict[str, Entry] = {
    "a": {"logprob": -1.2345678901234567, "greedy": True, "kl": [0.3, 1e-17]},
    "b": {"text": "two\nlines, \u00e4 \U0001f600", "tokens": 1},
}


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path).add(ENTRIES)
    found = Journal(path)
    assert {key: found[key] for key in ENTRIES} == ENTRIES
    assert len(found) == 2
    assert "c" not in found


def test_entries_are_added_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.add(ENTRIES)
    before = path.read_bytes()
    journal.add({"a": {"logprob": 0.0}})
    assert path.read_bytes() == before
    assert journal["a"] == ENTRIES["a"]


def test_other_settings_have_another_file(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    Journal.for_settings(folder, SETTINGS).add(ENTRIES)
    assert "a" not in Journal.for_settings(folder, {**SETTINGS, "dtype": "int8"})
    again = Journal.for_settings(folder, dict(reversed(SETTINGS.items())))  # order says nothing
    assert again["b"] == ENTRIES["b"]
    heads = [json.loads(path.read_text().splitlines()[0]) for path in folder.iterdir()]
    assert {"settings": SETTINGS} in heads


def test_without_a_path_entries_are_in_memory() -> None:
    journal = Journal()
    journal.add(ENTRIES)
    assert journal["b"] == ENTRIES["b"]


@given(st.data())
def test_a_damaged_file_loses_entries_but_tells_none_wrong(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    Journal(path).add(ENTRIES)
    raw = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["cut", "flip", "garbage"])):
        case "cut":
            del raw[data.draw(st.integers(0, len(raw) - 1)) :]
        case "flip":
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        case _:
            raw += data.draw(st.binary(max_size=40))
    path.write_bytes(raw)
    found = Journal(path)
    assert all(found[key] == ENTRIES[key] for key in ENTRIES if key in found)
    found.add(ENTRIES)  # and what is added next can be read
    again = Journal(path)
    assert {key: again[key] for key in ENTRIES} == ENTRIES


def test_a_line_of_another_shape_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = [[1, 2], "text", {"key": "a"}, {"key": "a", "entry": 3, "check": key_of("a", 3)}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(Journal(path)) == 0


def test_places_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot access"):
        Journal(tmp_path)  # a folder
    journal = Journal(tmp_path / "none" / "j.jsonl")
    with pytest.raises(UserError, match="cannot access"):
        journal.add(ENTRIES)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot access"):
        Journal.for_settings(tmp_path / "file", SETTINGS)


def test_keys_tell_values_apart() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    different = [key_of("ab"), key_of("a", "b"), key_of(["a", "b"]), key_of("a", ["b"]), key_of(1)]
    assert len(set(different)) == 5
    assert key_of("\ud800")  # half a character that a tokenizer's text may hold
