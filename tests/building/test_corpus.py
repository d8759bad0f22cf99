"""A corpus is the same documents however its file is written, and whatever is wrong is named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.building import corpus
from coreinfer.building.corpus import Document, corpus_identity, read_corpus
from coreinfer.errors import UserError
from coreinfer.jsonl import refuse


def ignore(_problem: str) -> None:
    pass


def texts(path: Path, **options: int) -> list[str]:
    return [document.text for document in read_corpus(path, on_skip=ignore, **options)]


def written(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_json_lines_may_be_objects_or_strings(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', '{"prompt": "two", "id": 3}', '"three"']
    path = written(tmp_path, "c.jsonl", "\n".join(lines))
    assert list(read_corpus(path, on_skip=refuse)) == [
        Document(1, "one"),
        Document(2, "two"),
        Document(3, "three"),
    ]


def test_bad_json_lines_are_named_and_skipped(tmp_path: Path) -> None:
    lines = [
        b'"good"', b"{", b"5", b'{"title": "x"}', b'{"text": null}', b'""', b'"\xe9"', b'"\\udc00"',
        b'"end"',
    ]  # fmt: skip
    path = written(tmp_path, "c.jsonl", b"\r\n".join(lines))
    problems: list[str] = []
    read = list(read_corpus(path, on_skip=problems.append))
    assert read == [Document(1, "good"), Document(9, "end")]
    numbers = [re.search(r"line (\d+)", problem) for problem in problems]
    assert [int(found[1]) for found in numbers if found] == [2, 3, 4, 5, 6, 7, 8]


@given(
    st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=5), min_size=1),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(["", " ", "\t"]),
)
def test_paragraphs_are_documents(
    tmp_path_factory: pytest.TempPathFactory,
    paragraphs: list[str],
    newline: str,
    bom: bool,
    blanks: int,
    blank: str,
) -> None:
    between = newline + (blank + newline) * blanks
    text = ("\ufeff" if bom else "") + between.join(f"a{newline}{p}" for p in paragraphs)
    path = written(tmp_path_factory.mktemp("c"), "c.txt", text)
    read = list(read_corpus(path, on_skip=refuse))
    assert [document.text for document in read] == [f"a{newline}{p}" for p in paragraphs]
    assert [document.line for document in read] == [
        1 + i * (2 + blanks) for i in range(len(paragraphs))
    ]


@given(st.text("ab \n", max_size=60), st.integers(1, 7), st.integers(1, 9))
def test_long_text_is_cut_and_nothing_else_is_lost(
    tmp_path_factory: pytest.TempPathFactory, text: str, max_chars: int, read_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("c")
    as_text = written(folder, "c.txt", text)
    as_json = written(folder, "c.jsonl", json.dumps(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "READ_BYTES", read_bytes)
        for path in (as_text, as_json):
            if not text.strip():
                with pytest.raises(UserError, match="no usable document"):
                    texts(path, max_chars=max_chars)
                continue
            pieces = texts(path, max_chars=max_chars)
            assert all(0 < len(piece) <= max_chars for piece in pieces)
            assert "".join("".join(pieces).split()) == "".join(text.split())


def test_a_cut_falls_between_words(tmp_path: Path) -> None:
    path = written(tmp_path, "c.txt", "eight or nine words, none of which is long\n")
    pieces = texts(path, max_chars=12)
    assert " ".join(pieces) == "eight or nine words, none of which is long"


def test_a_character_split_between_reads_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "READ_BYTES", 1)
    assert texts(written(tmp_path, "c.txt", "aé€😀")) == ["aé€😀"]


def test_a_huge_line_is_read_in_parts_of_bounded_size(tmp_path: Path) -> None:
    path = written(tmp_path, "c.txt", "word " * 600_000 + "\n\nend")
    pieces = texts(path)
    assert max(map(len, pieces)) <= corpus.MAX_CHARS
    assert sum(piece.count("word") for piece in pieces) == 600_000
    assert pieces[-1] == "end"


def test_short_documents_are_skipped_by_their_line(tmp_path: Path) -> None:
    path = written(tmp_path, "c.txt", "long enough\n\nab\n\nlong too\n")
    problems: list[str] = []
    read = list(read_corpus(path, min_chars=3, on_skip=problems.append))
    assert read == [Document(1, "long enough"), Document(5, "long too")]
    assert problems == [f"{str(path)!r}: line 3 has 2 characters, fewer than 3"]


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c"])
@pytest.mark.parametrize("data", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(UserError, match="no usable document"):
        texts(written(tmp_path, name, data))


def test_text_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "c.txt", b"one\n\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match="line 4 is not UTF-8; convert the file"):
        texts(path)
    with pytest.raises(UserError, match="line 1 is not UTF-8"):
        texts(written(tmp_path, "d.txt", "utf-16 text".encode("utf-16")))
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        texts(written(tmp_path, "e.txt", b"cut inside a character\n\xe2\x82"))


@given(st.binary(max_size=80), st.sampled_from(["c.txt", "c.jsonl"]))
def test_any_bytes_are_documents_or_a_users_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = written(tmp_path_factory.mktemp("c"), name, data)
    with contextlib.suppress(UserError):
        read = texts(path)
        assert read
        assert all(text.strip() == text != "" for text in read)


def test_a_folder_a_missing_file_and_a_pipe_are_errors(tmp_path: Path) -> None:
    for read in (texts, corpus_identity):
        with pytest.raises(UserError, match="is a folder"):
            read(tmp_path)
        with pytest.raises(UserError, match="no file at"):
            read(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="can be read only once"):
        corpus_identity(tmp_path / "pipe")


def test_a_file_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path, "c.txt", "text")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"cannot read .*Permission denied"):
        texts(path)


@given(st.binary(min_size=1, max_size=50))
def test_the_identity_is_the_files_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = written(tmp_path_factory.mktemp("c"), "c.txt", data)
    assert corpus_identity(path) == {
        "name": "c.txt",
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
