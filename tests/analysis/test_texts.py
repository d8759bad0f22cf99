"""Where texts come from, what is cut from them, and what is done to prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.analysis.disturbances import mixed, shuffled_sentences, typos
from coreinfer.analysis.settings import Settings
from coreinfer.analysis.texts import (
    Source,
    ending,
    prompts_source,
    require_distinct,
    text_source,
    window_of,
)
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Window, windows
from tests.analysis.sample import STORIES
from tests.tiny import tiny_backend

LONG = "".join(f"Line {i} of a long text that goes on and on.\n" for i in range(100))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_windows_of_documents_are_their_beginnings() -> None:
    backend, source = tiny_backend(), Source("s", STORIES)
    found = source.windows(backend, 4, 20, 8)
    assert [w.text for w in found] == [STORIES[i][:20] for i in (0, 10, 20, 30)]
    assert all(len(w.prompt) == 20 and len(w.continuation) == 8 for w in found)
    assert backend.tokenizer.decode(found[1].continuation) == STORIES[10][20:28]


def test_short_documents_are_joined() -> None:
    backend, source = tiny_backend(), Source("s", ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"))
    (first,) = source.windows(backend, 1, 3, 1)
    assert first.text == "ab\n"
    with pytest.raises(UserError, match=r"s has 2 passages of 3 \+ 1 tokens, 3 are needed"):
        source.windows(backend, 3, 3, 1)


def test_windows_of_one_text_are_those_of_the_evaluation() -> None:
    backend = tiny_backend()
    expected = windows(backend, LONG, count=3, prompt_tokens=30, continuation_tokens=5)
    assert Source("long", (LONG,)).windows(backend, 3, 30, 5) == expected
    with pytest.raises(UserError, match="long: the text has"):
        Source("long", (LONG,)).windows(backend, 300, 30, 5)


def test_halves_share_nothing_and_lose_nothing() -> None:
    documents = Source("s", STORIES[:5])
    assert documents.half(0).documents + documents.half(1).documents == STORIES[:5]
    first, second = (Source("t", (LONG,)).half(i).documents[0] for i in (0, 1))
    assert first + second == LONG
    assert second.startswith("\n")
    assert Source("t", ("abcd",)).half(1).documents == ("cd",)


def test_sources_are_read_from_files(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("Über alles.\n", encoding="utf-8")
    assert text_source(str(text)).documents == ("Über alles.\n",)
    assert text_source(f"mine={text}").name == "mine"
    rows = lines(tmp_path / "r.jsonl", {"q": "a?", "a": "b"}, {"q": "c?", "a": "d"})
    both = prompts_source(f"{rows}:q+a")
    assert (both.name, both.documents) == ("r", ("a?\nb", "c?\nd"))
    assert prompts_source(f"sums={rows}:q").documents == ("a?", "c?")
    plain = lines(tmp_path / "p.jsonl", {"prompt": "x"}, {"text": "y"}, {"text": "x"})
    assert prompts_source(str(plain)).documents == ("x", "y")  # each once
    assert prompts_source(f"{rows}:q").identity != prompts_source(f"{rows}:a").identity
    assert prompts_source(f"{rows}:q").identity != prompts_source(str(plain)).identity


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file at"):
        text_source(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="is a folder"):
        text_source(str(tmp_path))
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good\n\xff\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        text_source(str(bad))
    bad.write_bytes(b" \n")
    with pytest.raises(UserError, match="has no text"):
        text_source(str(bad))
    rows = lines(tmp_path / "r.jsonl", {"q": "a"}, {"q": 3})
    with pytest.raises(UserError, match="line 2 has a 'q' that is not text"):
        prompts_source(f"{rows}:q")
    with pytest.raises(UserError, match="line 1 has no 'a'"):
        prompts_source(f"{rows}:a")
    with pytest.raises(UserError, match="not an object with 'text'"):
        prompts_source(str(rows))
    with pytest.raises(UserError, match="1 distinct texts, at least 2"):
        prompts_source(str(lines(tmp_path / "one.jsonl", {"text": "a"}, {"text": "a"})))
    with pytest.raises(UserError, match="two texts are called 's'; name them"):
        require_distinct([Source("s", ("a",)), Source("t", ("a",)), Source("s", ("b",))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 1}, "windows must be at least 2, got 1"),
        ({"prompt_tokens": 7}, "prompt_tokens must be at least 8"),
        ({"continuation_tokens": 1}, "continuation_tokens must be at least 2"),
        ({"keep": 0.0}, "keep must be above 0"),
        ({"alphas": ()}, "alphas must be ascending and at least one"),
        ({"keeps": (0.4, 0.2)}, r"keeps must be ascending and at least one, got \[0.4, 0.2\]"),
        ({"keeps": (0.4, 1.2)}, "alphas and keeps must be above 0"),
        ({"lengths": (0, 2)}, "a prompt length must be at least 1"),
        ({"period": 1}, "period must be at least 2"),
        ({"long_tokens": 10}, "long_tokens must be at least 64"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"corpus_documents": 1}, "corpus_documents must be at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**changes)  # type: ignore[arg-type]


def test_a_window_keeps_its_ending() -> None:
    backend = tiny_backend()
    window = window_of(backend, "the whole prompt", 6, [1, 2])
    assert (window.text, window.continuation) == ("prompt", [1, 2])
    assert len(window.prompt) == 6
    assert ending(backend, window, 3).text == "mpt"
    assert ending(backend, window, 60) == window


WORDS = st.text("ab c.!", min_size=0, max_size=40)


@given(WORDS, st.integers(0, 99))
def test_shuffling_loses_no_word_and_is_seeded(text: str, seed: int) -> None:
    shuffled = shuffled_sentences(text, seed)
    assert sorted(shuffled.split()) == sorted(text.split())
    assert shuffled == shuffled_sentences(text, seed)


def test_sentences_stay_whole_when_shuffled() -> None:
    text = " ".join(f"Sentence number {i} ends here." for i in range(9))
    shuffled = shuffled_sentences(text, 1)
    assert shuffled != text
    assert all(f"Sentence number {i} ends here." in shuffled for i in range(9))


@given(st.text(max_size=60), st.integers(0, 99))
def test_no_rate_means_no_typo(text: str, seed: int) -> None:
    assert typos(text, 0.0, seed) == text


def test_typos_come_at_their_rate_and_change_letters_alone() -> None:
    text = "abcdefghij 1234567890 " * 200
    noisy = typos(text, 0.1, 3)
    assert noisy == typos(text, 0.1, 3) != typos(text, 0.1, 4)
    assert "".join(c for c in noisy if not c.isalpha()) != ""
    assert noisy.count("1234567890") > 190  # a swap may reach the space before it, no more
    left = sum(word == "abcdefghij" for word in noisy.split())
    assert 0.9**10 * 200 * 0.7 < left < 0.9**10 * 200 * 1.4


def test_mixed_prompts_have_their_own_end_and_others_before_it() -> None:
    made = [Window([99, *[i] * 8], [i], "") for i in range(5)]
    found = mixed(made, 4, head=1)
    for i, window in enumerate(found):
        pieces = [(i + 3) % 5, (i + 2) % 5, (i + 1) % 5, i]
        assert window.prompt == [99, *(piece for piece in pieces for _ in range(2))]
        assert window.continuation == [i]
