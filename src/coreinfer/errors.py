"""The one exception type that stands for a mistake the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong, the value, and what would do.

    The command line prints it without a traceback and exits with code 2.
    """


class UnsupportedModelError(UserError):
    """A model of an architecture that a backend does not know; another backend may."""


def require_ratio(name: str, value: object, *, zero_ok: bool = False) -> float:
    """Return `value` as a float in (0, 1] (or [0, 1] with `zero_ok`).

    Raises:
        UserError: if it is not a number or lies outside the range.
    """
    low = "0 to 1" if zero_ok else "above 0 and at most 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} must be a number {low}, got {value!r}")
    # A NaN fails every comparison, so it is refused here too.
    if not (0 < value <= 1 or (zero_ok and value == 0)):
        raise UserError(f"{name} must be {low}, got {value}")
    return float(value)


def require_whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int of at least `low`, and at most `high` where that is given.

    Raises:
        UserError: if it is not a whole number or lies outside the range.
    """
    wanted = f"at least {low}" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be a whole number, {wanted}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise UserError(f"{name} must be {wanted}, got {value}")
    return value


def meant(name: str, known: Iterable[str]) -> str:
    """For a message on an unknown name: "did you mean 'a' or 'b'? ", or "" if none is near."""
    close = difflib.get_close_matches(name.lower(), list(dict.fromkeys(known)), n=3)
    return f"did you mean {' or '.join(map(repr, close))}? " if close else ""
