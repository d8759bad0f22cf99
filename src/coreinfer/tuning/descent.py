"""Budgets of layers, by descent: what a layer's next bytes are worth says which gets more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from coreinfer.tuning.design import Design

RATE = 0.2  # of the first step, in log-weight; it falls to nothing, so that the last steps average
MEMORY = 0.8  # of what earlier prompts said

# (number of the step, design) -> what a byte more is worth in each layer, None where that is not
# known; None where the design is not affordable.
Worths = Callable[[int, Design], Sequence[float | None] | None]


def descend(
    design: Design, layers: int, worths: Worths, steps: int, moved: str = "weights"
) -> Design:
    """The design with the bytes moved to the layers where they are worth most, on prompt after
    prompt, until a byte is worth the same everywhere.

    At the least loss that a number of bytes can buy, no layer's next byte is worth more than
    another's. A step weighs each layer by how far its worth is from the mean, on prompts of its
    own, for all layers at once and with all of them sparse: what single layers lose alone, or what
    a few prompts lose, carries over less.

    Args:
        design: where to begin.
        layers: of the model.
        worths: measured on other prompts at each step.
        steps: how many, from 0.
        moved: the weights of the profile that move the bytes: "weights", or "active_weights".
    """
    known: dict[int, float] = {}
    affordable = design
    for number in range(steps):
        found = worths(number, design)
        if found is None:
            return affordable
        affordable = design
        for layer, value in enumerate(found):
            if value is None:
                known.pop(layer, None)
            else:
                known[layer] = MEMORY * known.get(layer, value) + (1 - MEMORY) * value
        mean = fmean(known.values()) if known else 0.0
        if mean <= 0:  # nothing to be gained: the prompts are all but dense already
            continue
        rate = RATE * (1 - number / steps)
        profile = design.profile
        weights = list(getattr(profile, moved) or (0.0,) * layers)
        for layer, value in known.items():
            weights[layer] += rate * min(max(value / mean - 1, -1.0), 1.0)
        made: dict[str, Any] = {moved: tuple(weights)}
        design = replace(design, profile=replace(profile, **made))
    return design
