"""What reading damaged files may lead to."""

from __future__ import annotations

from collections.abc import Callable

from coreinfer.errors import UserError


def model_or_one_line(load: Callable[[], object]) -> None:
    """Loads, or is refused with one line; any other exception fails the test."""
    message = ""
    try:
        load()
    except UserError as error:
        message = str(error)
    assert "\n" not in message
