"""Overlap of core sets between prompts, and their stability along one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coreinfer.backends.base import Backend
from coreinfer.core.coreset import CoreSet
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import prefill, prefill_on
from coreinfer.selectors import Selector


def core_sets(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    selector: Selector,
    texts: Sequence[str] | None = None,
) -> list[CoreSet]:
    """The core set of each prompt (token ids), computed as one batch."""
    read = prefill(backend, prompts, RecordingPlan.of(selector), texts)
    return [choice.core_set for choice in read.session.select(selector)]


def growing_sets(
    backend: Backend, prompt: Sequence[int], lengths: Sequence[int], selector: Selector
) -> list[CoreSet]:
    """The core sets of a prompt's first n tokens, for each n of the increasing `lengths`.

    The prompt is read once: statistics are additive, so each set goes on from the one before.
    """
    session = backend.start(RecordingPlan.of(selector))
    sets, before = [], 0
    for length in lengths:
        prefill_on(backend, session, [prompt[before:length]], [prompt[:before]])
        sets.append(session.select(selector)[0].core_set)
        before = length
    return sets


def pairwise_overlap(
    sets: Sequence[Mapping[int, Tensor]], num_neurons: Sequence[int]
) -> dict[int, Tensor]:
    """The Jaccard overlap of each two core sets, a layer each: [n, n] float64, 1 with itself.

    Args:
        sets: layer -> sorted indices; all with the same layers.
        num_neurons: D of every layer of the model.
    """
    found = {}
    for layer in sorted(sets[0]):
        members = torch.zeros(len(sets), num_neurons[layer])
        for row, one in enumerate(sets):
            members[row, one[layer].long()] = 1
        shared = (members @ members.T).double()  # whole numbers below 2^24: exact
        sizes = shared.diagonal()
        found[layer] = shared / (sizes.unsqueeze(0) + sizes.unsqueeze(1) - shared)
    return found


def random_overlap(keep: float) -> float:
    """Expected Jaccard index of two random sets that keep this fraction."""
    return keep / (2 - keep)
