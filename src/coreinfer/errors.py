"""The one exception type that stands for a mistake the user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong, the value, and what would do.

    The command line prints it without a traceback and exits with code 2.
    """


def require_ratio(name: str, value: object, *, zero_ok: bool = False) -> float:
    """Return `value` as a float in (0, 1] (or [0, 1] with `zero_ok`).

    Raises:
        UserError: if it is not a number or lies outside the range.
    """
    low = "0 to 1" if zero_ok else "above 0 and at most 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} must be a number {low}, got {value!r}")
    # A NaN fails both comparisons, so it is refused here too.
    if not ((0.0 <= value if zero_ok else 0.0 < value) and value <= 1.0):
        raise UserError(f"{name} must be {low}, got {value}")
    return float(value)
