"""Sessions of either backend on tiny models, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from coreinfer.backends.base import Backend, Phase, Session
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Selector, Stability
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import StandIn
from tests.native.pairs import tiny_native
from tests.tiny import CONFIGS, tiny_backend

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]
RULE = Stability(alpha=0.3, beta=0.4)
close = torch.testing.assert_close

Open = Callable[..., Backend]
HF: MappingProxyType[str, Open] = MappingProxyType(
    {f"hf-{family}": partial(tiny_backend, family) for family in CONFIGS}
)
NATIVE: MappingProxyType[str, Open] = MappingProxyType(
    {f"native-{name}": partial(tiny_native, name) for name in ("llama", "qwen3", "opt")}
)


def begun(
    opened: Backend, rule: Selector = RULE, stand_in: StandIn | None = None, halves: bool = False
) -> Any:
    """A session that records what a rule and a stand-in need, and with `halves` more."""
    plan = RecordingPlan.of(rule, stand_in)
    if halves:
        plan = RecordingPlan(alpha=plan.alpha, halves=True, sample_tokens=plan.sample_tokens)
    session: Session = opened.start(plan)
    return session


def sets(choices: Sequence[Any]) -> list[dict[int, list[int]]]:
    return [{i: t.tolist() for i, t in choice.core_set.layers.items()} for choice in choices]


def same_evidence(one: Evidence, two: Evidence, atol: float = 1e-4) -> None:
    groups = [(one.layers, two.layers)]
    if one.halves is not None and two.halves is not None:
        groups += list(zip(one.halves, two.halves, strict=True))
    for first, second in groups:
        for a, b in zip(first, second, strict=True):
            assert a.tokens == b.tokens
            assert a.counts.tolist() == b.counts.tolist()
            for name in ("positive_sum", "square_sum", "unit_square_sum", "input_sum"):
                close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=atol)


def decodes_several_as_one_by_one(session: Any) -> None:
    """Rows of different lengths in one call, and token by token."""
    session.prefill([A, B])
    session.select(RULE)
    rows = [list(range(20, 39)), [7, 8]]
    at_once = session.fork().decode(rows, Phase.SCORE)
    assert at_once.shape[:2] == (2, 19)
    one_by_one = session.fork()
    for step, token in enumerate(rows[0]):
        ids = [[token], rows[1][step : step + 1]]
        logits = one_by_one.decode(ids)
        for row in range(2):
            if ids[row]:
                close(at_once[row, step], logits[row, 0], rtol=1e-4, atol=1e-4)
