"""Overlap of core sets between prompts, and their stability along one prompt."""

from __future__ import annotations

from collections.abc import Sequence

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
