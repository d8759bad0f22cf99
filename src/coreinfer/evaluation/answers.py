"""Answers that were computed once are kept: a run that was interrupted goes on, a finished one is
there at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreinfer.errors import UserError
from coreinfer.files import describe_os_error

Answer = dict[str, Any]  # plain JSON


def key_of(*parts: Any) -> str:
    """A digest of plain JSON: equal for equal values, whatever the order of their keys."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


class Answers:
    """Answers by key, in a file that grows a line an answer; without a folder, in memory.

    Args:
        folder: where files of answers lie; it is made if need be.
        settings: what the answers depend on beside their keys, plain JSON; it names the file.

    Raises:
        UserError: if the file cannot be read or written.
    """

    def __init__(
        self, folder: Path | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._found: dict[str, Answer] = {}
        self._path: Path | None = None
        if folder is None:
            return
        self._path = folder / f"{key_of(settings)}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._found = _read(self._path)
            else:
                self._append(json.dumps({"settings": settings}) + "\n")
        except OSError as error:
            raise UserError(describe_os_error(error, self._path)) from error

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Answer:
        return self._found[key]

    def __len__(self) -> int:
        return len(self._found)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers, all of them in one write.

        Raises:
            UserError: if they cannot be written.
        """
        new = {key: answer for key, answer in answers.items() if key not in self._found}
        lines = [_line(key, answer) for key, answer in new.items()]
        try:
            self._append("".join(lines))
        except OSError as error:
            raise UserError(describe_os_error(error, str(self._path))) from error
        self._found |= new

    def _append(self, lines: str) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)


def _line(key: str, answer: Answer) -> str:
    """The check lets a damaged line be told from a whole one."""
    return json.dumps({"key": key, "answer": answer, "check": key_of(key, answer)}) + "\n"


def _read(path: Path) -> dict[str, Answer]:
    """What is whole in a file; a damaged line is as if it were not there."""
    raw = path.read_bytes()
    found = {}
    for line in raw.splitlines():
        try:
            row = json.loads(line)
            key, answer = row["key"], row["answer"]
            if row["check"] == key_of(key, answer) and isinstance(answer, dict):
                found[str(key)] = answer
        except (ValueError, TypeError, KeyError, RecursionError):  # the head, and what is damaged
            continue
    if raw and not raw.endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:  # so that the next line begins afresh
            file.write("\n")
    return found
