"""Parsing option values: text to numbers, layer lists and budgets."""

from __future__ import annotations

import argparse


def number(text: str) -> float:
    """A real number; whether it is in range is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def layer_list(text: str) -> tuple[int, ...]:
    """ "0-2,28,29" -> (0, 1, 2, 28, 29); "" and "none" are no layer."""
    layers: set[int] = set()
    for part in _parts(text):
        first, dash, last = part.partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} is no layer; write layers from 0 as in '0-2,28,29'"
            ) from None
        if high < low or high - low > 100_000:
            raise argparse.ArgumentTypeError(f"{part!r} is no range; write it as in '0-2'")
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


def layer_budgets(text: str) -> dict[int, float]:
    """ "0-5=0.8,6=0.3" -> the fraction of each of those layers."""
    budgets: dict[int, float] = {}
    for part in _parts(text):
        layers, equals, keep = part.partition("=")
        if not (layers.strip() and equals):
            raise argparse.ArgumentTypeError(f"{part!r} is no budget; write 'LAYERS=FRACTION'")
        budgets |= dict.fromkeys(layer_list(layers), number(keep))
    return budgets


def fractions(text: str) -> tuple[float, ...]:
    """ "0.2,0.4" -> (0.2, 0.4)."""
    return tuple(number(part) for part in _parts(text))


def whole_numbers(text: str) -> tuple[int, ...]:
    """ "16,64" -> (16, 64)."""
    return tuple(whole(part) for part in _parts(text))


def names(text: str) -> tuple[str, ...]:
    """ "int8,int4" -> ("int8", "int4"), each once."""
    return tuple(dict.fromkeys(_parts(text)))


def _parts(text: str) -> list[str]:
    text = text.strip()
    return [] if text in ("", "none") else [part.strip() for part in text.split(",")]
