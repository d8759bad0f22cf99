"""Local refinement: bytes moved between groups of layers, kept where the measured loss falls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from coreinfer.tuning.design import Design

# Groups of layers and the log-weight that they are moved by, round by round; the last one repeats.
ROUNDS = ((6, 0.6), (10, 0.4), (15, 0.3))
STRIDES = (0.5, 1.0, 2.0, 3.0)  # along the slope that was measured, in such moves

# The loss of each design at the same bytes; None for one that they do not pay for.
Losses = Callable[[Sequence[Design]], Sequence[float | None]]


def refine(design: Design, layers: int, losses: Losses, rounds: int) -> Design:
    """The design with the weights of its layers changed so that the loss on the prompts falls.

    A round gives each group of layers more, then less, at the others' cost, for the bytes stay the
    same; what each move changes is the slope of the loss, with all layers sparse, whatever single
    layers lose. Then some steps down that slope are measured. The best of all that was measured
    is where the next round begins; a round without gain is followed by the next finer one.

    Args:
        design: where to begin.
        layers: of the model.
        losses: measures designs.
        rounds: how many, from 0.
    """
    (loss,) = losses([design]) if rounds else (None,)
    if loss is None:
        return design
    profile = design.profile
    sparse = range(profile.first, layers - profile.last)
    for number in range(rounds):
        count, by = ROUNDS[min(number, len(ROUNDS) - 1)]
        groups = in_groups(sparse, count)
        moved = [_moved(design, group, sign * by, layers) for group in groups for sign in (1, -1)]
        found = losses(moved)
        more, less = found[0::2], found[1::2]
        slopes = [
            0.0 if up is None or down is None else (up - down) / 2
            for up, down in zip(more, less, strict=True)
        ]
        steps = _steps(design, groups, slopes, by, layers)
        tried = [*zip(moved, found, strict=True), *zip(steps, losses(steps), strict=True)]
        for other, its_loss in tried:
            if its_loss is not None and its_loss < loss:
                design, loss = other, its_loss
    return design


def in_groups(layers: Sequence[int], count: int) -> list[list[int]]:
    """Consecutive groups of about the same size, none empty."""
    count = min(count, len(layers))
    ends = [len(layers) * i // count for i in range(count + 1)]
    return [list(layers[a:b]) for a, b in pairwise(ends)]


def _steps(
    design: Design, groups: Sequence[Sequence[int]], slopes: Sequence[float], by: float, layers: int
) -> list[Design]:
    """Down the slope by some lengths; the steepest group moves by `by` times the length."""
    steepest = max(map(abs, slopes))
    made = []
    for stride in STRIDES if steepest else ():
        step = design
        for group, slope in zip(groups, slopes, strict=True):
            step = _moved(step, group, -by * stride * slope / steepest, layers)
        made.append(step)
    return made


def _moved(design: Design, group: Sequence[int], by: float, layers: int) -> Design:
    return replace(design, profile=design.profile.moved(group, by, layers))
