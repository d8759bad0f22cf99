"""Reading JSON Lines: one JSON value a line, and every bad line named by its number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

from coreinfer.errors import UserError

MAX_LINE_BYTES = 64 * 2**20  # a line is parsed as a whole, so its length bounds the memory

OnSkip = Callable[[str], None]


def refuse(problem: str) -> NoReturn:
    """The strict `on_skip`: the first bad line is an error."""
    raise UserError(problem)


@contextmanager
def open_to_read(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes.

    Raises:
        UserError: if it is missing, is a folder, or cannot be read, now or later.
    """
    try:
        with Path(path).open("rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"no file at {str(path)!r}") from None
    except IsADirectoryError:
        raise UserError(f"{str(path)!r} is a folder, expected a file") from None
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def read_text(path: str | Path) -> str:
    """All of a UTF-8 text file, without a byte order mark.

    Raises:
        UserError: if it is missing, unreadable or in another encoding; with the line.
    """
    with open_to_read(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path, raw[: error.start].count(b"\n") + 1)) from None


def not_utf8(path: str | Path, line: int) -> str:
    """What is wrong with text in another encoding; the line says where it shows."""
    return f"{str(path)!r}: line {line} is not UTF-8; convert the file to UTF-8"


def is_text(value: object) -> TypeGuard[str]:
    """Whether a JSON value is text that can be encoded.

    JSON can spell half of a surrogate pair, which is no character: no tokenizer takes it.
    """
    try:
        return isinstance(value, str) and bool(value.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False


def read_json_lines(path: str | Path, on_skip: OnSkip = refuse) -> Iterator[tuple[int, Any]]:
    """The values of a JSON Lines file with their line numbers (from 1), one at a time.

    Blank lines are passed over. A line that is not UTF-8, is not JSON, or is longer than
    MAX_LINE_BYTES goes to `on_skip` as one line of text; what follows it is still read.

    Raises:
        UserError: if the file is missing or unreadable; or what `on_skip` raises.
    """
    for number, raw in _lines(path):
        if raw is None:
            on_skip(f"{str(path)!r}: line {number} is longer than {MAX_LINE_BYTES} bytes")
            continue
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            on_skip(not_utf8(path, number))
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of too many digits
            on_skip(f"{str(path)!r}: line {number} is not JSON ({error})")
            continue
        yield number, value


def read_jsonl(
    path: str | Path, required_keys: Sequence[str], on_skip: OnSkip = refuse
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers (from 1), one at a time.

    Args:
        path: the file.
        required_keys: keys that each object must have, with text as value.
        on_skip: told of each bad line, which is then skipped; the default refuses the file.

    Raises:
        UserError: if the file is missing, unreadable or without a usable line; or what `on_skip`
            raises.
    """
    usable = False
    for number, value in read_json_lines(path, on_skip):
        problem = _problem(value, required_keys)
        if problem is None:
            usable = True
            yield number, value
        else:
            on_skip(f"{str(path)!r}: line {number} {problem}")
    if not usable:
        example = json.dumps(dict.fromkeys(required_keys, "..."))
        raise UserError(f"{str(path)!r} has no usable line; expected {example} on each")


def _problem(value: object, required_keys: Sequence[str]) -> str | None:
    if not isinstance(value, dict):
        return "is not a JSON object"
    for key in required_keys:
        if key not in value:
            return f"has no {key!r}"
        if not is_text(value[key]):
            return f"has a {key!r} that is not text"
    return None


def _lines(path: str | Path) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers; None in place of one that is too long to hold."""
    with open_to_read(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            yield number, raw if len(raw) <= MAX_LINE_BYTES else None
            while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES + 1)
