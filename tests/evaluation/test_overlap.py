"""Core sets of many prompts, and of a growing one."""

from __future__ import annotations

import torch

from coreinfer.core.coreset import CoreSet
from coreinfer.evaluation.overlap import core_sets, growing_sets
from coreinfer.selectors import Impact, Stability
from tests.tiny import tiny_backend

PROMPT = list(b"a prompt that goes on for a while, and then some more")


def same(a: CoreSet, b: CoreSet) -> bool:
    return all(torch.equal(a.layers[layer], b.layers[layer]) for layer in range(3))


def test_a_batch_has_the_sets_of_its_prompts_alone() -> None:
    backend, selector = tiny_backend(), Stability(beta=0.3)
    prompts = [PROMPT, PROMPT[:9], PROMPT[5:30]]
    for prompt, one in zip(prompts, core_sets(backend, prompts, selector), strict=True):
        assert same(one, core_sets(backend, [prompt], selector)[0])


def test_a_growing_prompt_has_the_sets_of_its_beginnings() -> None:
    backend, lengths = tiny_backend(), [4, 5, 20, len(PROMPT)]
    for selector in (Stability(beta=0.3), Impact(beta=0.3)):
        sets = growing_sets(backend, PROMPT, lengths, selector)
        for length, one in zip(lengths, sets, strict=True):
            assert same(one, core_sets(backend, [PROMPT[:length]], selector)[0])
