"""Results that were measured once are kept, so that a search that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Quality
from coreinfer.files import describe_os_error

NAMES = tuple(field.name for field in fields(Quality))


def digest(value: Any) -> str:
    """Of plain JSON: the same for equal values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Journal:
    """Results by key, in a file that grows a line a result; without a path, in memory.

    Raises:
        UserError: if the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found: dict[str, Quality] = {}
        if path is None:
            return
        try:
            whole = path.read_bytes() if path.exists() else b""
            self._found = dict(filter(None, map(_parsed, whole.splitlines())))
            if whole and not whole.endswith(b"\n"):  # cut off: the next line begins afresh
                self._append("\n")
        except OSError as error:
            raise UserError(describe_os_error(error, path)) from error

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Quality:
        return self._found[key]

    def add(self, results: Mapping[str, Quality]) -> None:
        """Keep results, all of them in one write.

        Raises:
            UserError: if they cannot be written.
        """
        new = {key: quality for key, quality in results.items() if key not in self._found}
        lines = [json.dumps({"key": key, **asdict(quality)}) + "\n" for key, quality in new.items()]
        try:
            self._append("".join(lines))
        except OSError as error:
            raise UserError(describe_os_error(error, str(self._path))) from error
        self._found |= new

    def _append(self, lines: str) -> None:
        if self._path is not None and lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)


def _parsed(line: bytes) -> tuple[str, Quality] | None:
    """The result on a line; None for a line that is damaged, which is measured again."""
    try:
        row = json.loads(line)
        values = {name: [_number(value) for value in row[name]] for name in NAMES}
        return str(row["key"]), Quality(**values)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _number(value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return value
