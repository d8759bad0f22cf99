"""Builds that are cut off, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, after: int) -> None:
    """Ctrl-C in the call of a method that follows the first `after`."""
    original: Callable[..., Any] = getattr(owner, method)
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(owner, method, wrapped)
