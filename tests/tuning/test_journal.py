"""Kept results: read back as they were, and damage costs no more than what it hit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality
from coreinfer.tuning.journal import Journal, digest

ONE = Quality([1.0, 0.1], [0.3, 1e-17], [1.0, 0.5], [0.5, 0.5], [10, 12])
TWO = Quality([2.0], [0.0], [0.0], [1.0], [7])


def test_results_are_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    assert len(journal) == 0
    journal.add({"a": ONE, "b": TWO})
    journal.add({"a": TWO})  # what is known stays
    again = Journal(path)
    assert (again["a"], again["b"], len(again)) == (ONE, TWO, 2)
    assert "c" not in again


def test_what_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path).add({"a": ONE, "b": TWO})
    path.write_bytes(path.read_bytes()[:-9])
    journal = Journal(path)
    assert "a" in journal
    assert "b" not in journal
    journal.add({"b": TWO})
    assert Journal(path)["b"] == TWO


@given(position=st.integers(0, 400), damage=st.binary(min_size=1, max_size=8))
def test_damage_is_never_taken_for_a_result(
    position: int, damage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("j") / "j.jsonl"
    Journal(path).add({"a": ONE})
    whole = path.read_bytes()
    Journal(path).add({"b": TWO})
    later = path.read_bytes()[len(whole) :]
    position = min(position, len(whole) - 1)
    path.write_bytes(whole[:position] + damage + whole[position + len(damage) :] + later)
    journal = Journal(path)
    for key in ("a", "b"):
        if key in journal:  # a digit may have become another one: that cannot be seen
            assert all(isinstance(v, (int, float)) for v in journal[key].kl)


def test_places_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot access"):
        Journal(tmp_path)  # a folder
    journal = Journal(tmp_path / "none" / "j.jsonl")
    with pytest.raises(UserError, match="cannot access"):
        journal.add({"a": ONE})


def test_a_digest_knows_values_not_their_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert digest("\ud800")  # half of a surrogate pair is text too
