"""A corpus as a stream of documents: any size of file in a fixed amount of memory."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer.errors import UserError
from coreinfer.jsonl import OnSkip, is_text, not_utf8, open_to_read, read_json_lines

MAX_CHARS = 20_000  # about 5000 tokens: a longer document becomes several
READ_BYTES = 2**20


@dataclass(frozen=True)
class Document:
    """A document's text, and the line of the file on which it begins."""

    line: int
    text: str


def read_corpus(
    path: str | Path, *, min_chars: int = 1, max_chars: int = MAX_CHARS, on_skip: OnSkip
) -> Iterator[Document]:
    """The documents of a corpus, one at a time.

    A `.jsonl` file holds one document a line: an object with `text` (or `prompt`), or a JSON
    string. Any other file is text, its documents separated by blank lines.

    Args:
        path: the file.
        min_chars: a shorter document is skipped.
        max_chars: a longer document is cut into several, between words where it has any.
        on_skip: told of everything that is skipped, by line number; the rest is still read.

    Raises:
        UserError: if the file is missing, unreadable, text that is not UTF-8, or without a usable
            document.
    """
    if Path(path).suffix.lower() == ".jsonl":
        documents = _json_documents(path, on_skip)
    else:
        documents = _paragraphs(path, max_chars)
    usable = False
    for line, document in documents:
        for piece in _pieces(document, max_chars):
            text = piece.strip()
            if len(text) >= max(min_chars, 1):
                usable = True
                yield Document(line, text)
            else:
                on_skip(
                    f"{str(path)!r}: line {line} has {len(text)} characters, fewer than {min_chars}"
                )
    if not usable:
        raise UserError(
            f"{str(path)!r} has no usable document; expected .jsonl lines with 'text', or text "
            f"with blank lines between documents of {min_chars} characters or more"
        )


def corpus_identity(path: str | Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a corpus file: what binds a build to its input.

    Raises:
        UserError: if it is missing, unreadable, or no regular file (it is read more than once).
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{str(path)!r} can be read only once; save the corpus as a file first")
    digest, size = hashlib.sha256(), 0
    with open_to_read(path) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}


def _json_documents(path: str | Path, on_skip: OnSkip) -> Iterator[tuple[int, str]]:
    """(line number, text) of each line that has text."""
    for number, value in read_json_lines(path, on_skip):
        text = value.get("text", value.get("prompt")) if isinstance(value, dict) else value
        if is_text(text):
            yield number, text
        else:
            on_skip(f"{str(path)!r}: line {number} is not an object with 'text', nor a string")


def _paragraphs(path: str | Path, max_chars: int) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of each paragraph, in parts where it is long."""
    first, last, held = 1, 0, ""
    for number, part in _text_lines(path):
        # What ends a paragraph is a blank line, not a blank part of a long one.
        if part.strip() or (held and number == last):
            first = first if held else number
            last = number
            held += part
            # Handed on as soon as it is long, cut where `_pieces` would cut the whole of it.
            while len(held) > max_chars:
                end = _cut(held, max_chars)
                yield first, held[:end]
                first, held = number, held[end:]
        elif held:
            yield first, held
            held = ""
    if held:
        yield first, held


def _text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of a text file; a line longer than READ_BYTES comes in parts."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1
    with open_to_read(path) as file:
        while True:
            raw = file.readline(READ_BYTES)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError:
                raise UserError(not_utf8(path, number)) from None
            if not raw:
                return
            if text:
                yield number, text
            number += raw.endswith(b"\n")


def _pieces(text: str, max_chars: int) -> Iterator[str]:
    """The text in pieces of at most `max_chars`."""
    start = 0
    while len(text) - start > max_chars:
        end = start + _cut(text[start : start + max_chars], max_chars)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, limit: int) -> int:
    """Where to end a piece of at most `limit` characters: after a word, if one is near."""
    for end in range(limit, limit // 2, -1):
        if text[end - 1].isspace():
            return end
    return limit
