"""Prompts to search with and to report on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coreinfer.backends.hf.session import HfBackend
from coreinfer.errors import UserError
from coreinfer.selectors import Dense
from coreinfer.tuning.prompts import Amount, read_split
from tests.tiny import tiny_backend

SMALL = Amount(search=3, report=2, prompt_tokens=10, continuation_tokens=4, raw=True)


@pytest.fixture(scope="module")
def backend() -> HfBackend:
    return tiny_backend()


def skip(_problem: str) -> None: ...


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_is_cut_in_halves(backend: HfBackend, tmp_path: Path) -> None:
    first = "".join(f"first half {i}. " for i in range(20))
    second = "".join(f"SECOND HALF {i}. " for i in range(18))
    (tmp_path / "t.txt").write_text(f"{first}\n{second}")
    split = read_split(backend, tmp_path / "t.txt", SMALL, skip)
    assert (len(split.search), len(split.report)) == (3, 2)
    assert all(window.text in first for window in split.search)
    assert all(window.text in second for window in split.report)
    for window in split.search + split.report + split.descent:
        assert (len(window.prompt), len(window.continuation)) == (10, 4)
    # As many as there is room for, none of them to be reported on, and not in the text's order.
    assert len(split.descent) == len(first) // 14
    assert all(window.text in first for window in split.descent)
    starts = [first.index(window.text) for window in split.descent]
    assert starts != sorted(starts)
    few = read_split(backend, tmp_path / "t.txt", replace(SMALL, descent=4), skip)
    assert len(few.descent) == 4


def test_prompts_go_to_the_parts_by_turns_each_once(backend: HfBackend, tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i // 2}", "continuation": f"answer {i // 2}"} for i in range(14)]
    split = read_split(backend, write(tmp_path / "p.jsonl", rows), SMALL, skip)
    assert [window.text for window in split.search] == ["prompt 0", "prompt 2", "prompt 4"]
    assert [window.text for window in split.report] == ["prompt 1", "prompt 3"]
    assert [window.text for window in split.descent] == [f"prompt {i}" for i in (0, 2, 4, 6)]
    assert split.search[1].continuation == backend.tokenizer("answ").input_ids  # 4 at most


def test_without_a_continuation_the_dense_answer_is_it(backend: HfBackend, tmp_path: Path) -> None:
    from coreinfer.api import LLM

    rows = [{"prompt": f"the prompt {i}"} for i in range(4)]
    split = read_split(backend, write(tmp_path / "p.jsonl", rows), SMALL, skip)
    for window in split.search + split.report:
        record = LLM(backend).generate(window.text, Dense(), None, raw=True, max_new_tokens=4)[0]
        assert window.continuation == record.token_ids


def test_bad_lines_are_named_and_passed_over(backend: HfBackend, tmp_path: Path) -> None:
    problems: list[str] = []
    rows = [
        {"prompt": "good one", "continuation": "yes"},
        {"prompt": " ", "continuation": "yes"},
        {"prompt": "bad", "continuation": 5},
        {"text": "no prompt"},
        {"prompt": "short", "continuation": "y"},
        {"prompt": "good two", "continuation": "yes"},
        {"prompt": "good three", "continuation": "yes"},
    ]
    split = read_split(backend, write(tmp_path / "p.jsonl", rows), SMALL, problems.append)
    assert [w.text for w in split.search + split.report] == ["good one", "good two", "good three"]
    assert len(problems) == 4
    for part in (
        "line 2 has an empty prompt",
        "line 3 has a 'continuation' that is not text",
        "line 4 has no 'prompt'",
        "'short' has an answer of fewer than 2 tokens",
    ):
        assert any(part in problem for problem in problems), part  # fmt: skip


def test_prompts_without_room_for_an_answer_are_named_and_passed_over(
    backend: HfBackend, tmp_path: Path
) -> None:
    problems: list[str] = []
    rows = [
        {"prompt": "a" * 511, "continuation": "yes"},
        {"prompt": "b" * 600},
        {"prompt": "c" * 510},
        {"prompt": "d" * 509, "continuation": "answer"},
        {"prompt": "good one"},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    split = read_split(backend, path, SMALL, problems.append)
    found = {w.text[0]: len(w.continuation) for w in (*split.search, *split.report)}
    assert found == {"c": 2, "d": 3, "g": 4}
    assert problems == [
        f"{str(path)!r}: line 2: the prompt has 600 tokens, tiny-llama reads 512 at most and needs "
        "room for an answer; shorten the prompt",
        f"the prompt {'a' * 40!r} has an answer of fewer than 2 tokens",
    ]


def test_windows_longer_than_the_model_reads_are_refused(
    backend: HfBackend, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("words and more words\n" * 400)
    amount = replace(SMALL, prompt_tokens=500, continuation_tokens=13)
    with pytest.raises(UserError, match=r"^windows of 500 \+ 13 tokens are longer than the 512"):
        read_split(backend, tmp_path / "t.txt", amount, skip)


def test_what_cannot_be_split_says_so(backend: HfBackend, tmp_path: Path) -> None:
    def refused(path: Path, problem: str) -> None:
        with pytest.raises(UserError, match=problem):
            read_split(backend, path, SMALL, skip)

    refused(tmp_path / "none.txt", "no file at")
    refused(tmp_path / "none.jsonl", "no file at")
    refused(tmp_path, "is a folder")
    (tmp_path / "s.txt").write_text("too short")
    refused(tmp_path / "s.txt", "the half to search with: the text has")
    (tmp_path / "l.txt").write_bytes("caf\u00e9".encode("latin-1"))
    refused(tmp_path / "l.txt", "line 1 is not UTF-8")
    one = [{"prompt": "only", "continuation": "one"}] * 3
    refused(write(tmp_path / "o.jsonl", one), "1 different prompt")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"search": 0}, "search must be at least 1, got 0"),
        ({"descent": 0}, "descent must be at least 1"),
        ({"report": -1}, "report must be at least 1"),
        ({"prompt_tokens": 0}, "prompt tokens must be at least 1"),
        ({"continuation_tokens": 1}, "continuation tokens must be at least 2"),
    ],
)
def test_amounts_out_of_range(change: dict[str, int], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Amount(**change)
