"""JSON Lines: every good line is read, every bad one is named by its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer import jsonl
from coreinfer.errors import UserError
from coreinfer.jsonl import is_text, read_json_lines, read_jsonl, read_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def file_with(folder: Path, data: bytes) -> Path:
    path = folder / "lines.jsonl"
    path.write_bytes(data)
    return path


@given(st.lists(JSON), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[object],
    newline: bytes,
    bom: bool,
    ends: bool,
) -> None:
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    data = newline.join(line.encode("utf-8", "surrogatepass") for line in lines)
    data = (b"\xef\xbb\xbf" if bom else b"") + data + (newline if ends else b"")
    path = file_with(tmp_path_factory.mktemp("j"), data)
    assert list(read_json_lines(path)) == list(enumerate(values, start=1))


@given(st.lists(st.sampled_from(["good", "bad", "blank", "latin"])))
def test_a_bad_line_is_named_and_the_rest_is_read(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str]
) -> None:
    written = {"good": b'{"a": "b"}', "bad": b'{"a": ', "blank": b"  ", "latin": b'"\xe9"'}
    path = file_with(tmp_path_factory.mktemp("j"), b"".join(written[k] + b"\n" for k in kinds))
    skipped: list[str] = []
    read = [number for number, _ in read_json_lines(path, skipped.append)]
    of_kind = {k: [i for i, kind in enumerate(kinds, 1) if kind == k] for k in written}
    assert read == of_kind["good"]
    assert len(skipped) == len(of_kind["bad"]) + len(of_kind["latin"])
    for number in of_kind["bad"]:
        assert any(f"line {number} is not JSON" in problem for problem in skipped)
    for number in of_kind["latin"]:
        assert any(f"line {number} is not UTF-8" in problem for problem in skipped)
    assert all("\n" not in problem for problem in skipped)


def test_the_first_bad_line_is_an_error_unless_it_may_be_skipped(tmp_path: Path) -> None:
    path = file_with(tmp_path, b'{"a": "b"}\nnonsense\n')
    with pytest.raises(UserError, match=r"line 2 is not JSON"):
        list(read_json_lines(path))


@pytest.mark.parametrize("line", [b"[" * 100_000, b"1" * 10_000], ids=["deep", "long number"])
def test_what_the_parser_cannot_take_is_a_bad_line(tmp_path: Path, line: bytes) -> None:
    skipped: list[str] = []
    path = file_with(tmp_path, line + b'\n"next"\n')
    assert list(read_json_lines(path, skipped.append)) == [(2, "next")]
    assert len(skipped) == 1
    assert "line 1 " in skipped[0]


@pytest.mark.parametrize("length", [9, 10, 11, 25, 31])
def test_a_line_too_long_to_hold_is_skipped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 10)  # the newline included
    line = b'"' + b"x" * (length - 3) + b'"\n'
    assert len(line) == length
    skipped: list[str] = []
    read = list(read_json_lines(file_with(tmp_path, line + b'"next"'), skipped.append))
    assert [number for number, _ in read] == ([1, 2] if length <= 10 else [2])
    assert len(skipped) == (length > 10)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file at"):
        list(read_json_lines(tmp_path / "none"))
    with pytest.raises(UserError, match="is a folder"):
        list(read_json_lines(tmp_path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1]", "is not a JSON object"),
        ('{"b": "x"}', "has no 'a'"),
        ('{"a": 1}', "has a 'a' that is not text"),
        ('{"a": "\\ud800"}', "has a 'a' that is not text"),
    ],
)
def test_objects_need_their_keys(tmp_path: Path, line: str, problem: str) -> None:
    path = file_with(tmp_path, f'{line}\n{{"a": "good"}}\n'.encode())
    skipped: list[str] = []
    assert list(read_jsonl(path, ["a"], skipped.append)) == [(2, {"a": "good"})]
    assert len(skipped) == 1
    assert f"line 1 {problem}" in skipped[0]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"1\n", b"\xff\xfe1\x00\n\x00"])
def test_a_file_without_a_usable_line_is_an_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r'no usable line; expected \{"a": "..."\} on each'):
        list(read_jsonl(file_with(tmp_path, data), ["a"], lambda _problem: None))


@given(st.text())
def test_text_is_what_can_be_encoded(text: str) -> None:
    assert is_text(text)
    assert not is_text("\ud800" + text)
    assert not is_text(text.encode())


def test_a_text_is_read_whole_and_its_encoding_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n two\u00e4\n".encode())
    assert read_text(path) == "one\r\n two\u00e4\n"  # every byte but the byte order mark
    path.write_bytes(b"one\ntwo\nthr\xffee")
    with pytest.raises(UserError, match=r"line 3 is not UTF-8"):
        read_text(path)
    with pytest.raises(UserError, match="no file at"):
        read_text(tmp_path / "none.txt")
