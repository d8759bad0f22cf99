"""The settings that were found, as a TOML file that `--config` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coreinfer.files import replace_when_done


def to_toml(settings: Mapping[str, Any], comments: Sequence[str]) -> str:
    """Options by their long names: text, numbers, lists of numbers, and tables of numbers."""
    lines = [f"# {''.join(c if c.isprintable() else ' ' for c in line)}" for line in comments]
    tables = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    lines += [f"{name} = {_value(v)}" for name, v in settings.items() if name not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f'"{key}" = {_value(value)}' for key, value in table.items())]
    return "\n".join(lines) + "\n"


def write_settings(path: str | Path, settings: Mapping[str, Any], comments: Sequence[str]) -> None:
    """Raises UserError if it cannot be written."""
    with replace_when_done(path) as partial:
        partial.write_text(to_toml(settings, comments), encoding="utf-8")


def _value(value: Any) -> str:
    # A basic string of TOML is one of JSON, but for the one character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
