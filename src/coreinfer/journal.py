"""What was computed once is kept: interrupted work goes on, finished work is there at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreinfer.errors import UserError
from coreinfer.files import describe_os_error

Entry = dict[str, Any]  # plain JSON


def key_of(*parts: Any) -> str:
    """A digest of plain JSON: equal for equal values, whatever the order of their keys."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


class Journal:
    """Entries by key, in a file that grows a line an entry; without a path, in memory.

    Raises:
        UserError: if the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found: dict[str, Entry] = {}
        if path is None:
            return
        try:
            raw = path.read_bytes() if path.exists() else b""
            self._found = dict(filter(None, map(_parsed, raw.splitlines())))
            if raw and not raw.endswith(b"\n"):  # cut off: the next line begins afresh
                self._append("\n")
        except OSError as error:
            raise UserError(describe_os_error(error, path)) from error

    @classmethod
    def for_settings(cls, folder: Path, settings: Mapping[str, Any]) -> Journal:
        """The one of a folder that is for these settings, plain JSON; the file is named by them and
        begins with them.

        Raises:
            UserError: if the folder or the file cannot be made or read.
        """
        path = folder / f"{key_of(settings)}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(describe_os_error(error, path)) from error
        return cls(path)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Entry:
        return self._found[key]

    def __len__(self) -> int:
        return len(self._found)

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Keep entries, all of them in one write; those that are known stay as they were.

        Raises:
            UserError: if they cannot be written.
        """
        new = {key: entry for key, entry in entries.items() if key not in self._found}
        try:
            self._append("".join(_line(key, entry) for key, entry in new.items()))
        except OSError as error:
            raise UserError(describe_os_error(error, str(self._path))) from error
        self._found |= new

    def _append(self, lines: str) -> None:
        if self._path is not None and lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)


def _line(key: str, entry: Entry) -> str:
    """The check lets a damaged line be told from a whole one."""
    return json.dumps({"key": key, "entry": entry, "check": key_of(key, entry)}) + "\n"


def _parsed(line: bytes) -> tuple[str, Entry] | None:
    """The entry on a line; None for the settings, and for a line that is damaged."""
    try:
        row = json.loads(line)
        key, entry = row["key"], row["entry"]
        whole = row["check"] == key_of(key, entry) and isinstance(entry, dict)
        return (str(key), entry) if whole else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
