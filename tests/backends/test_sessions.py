"""What a session owes whatever its backend: one account however the tokens come in, forks that do
not touch, turns that add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coreinfer.backends.base import Phase
from coreinfer.errors import UserError
from coreinfer.selectors import Griffin, Impact, Selector, Stability
from coreinfer.standins import Linear, Mean, StandIn
from tests.backends.sessions import (
    HF,
    NATIVE,
    RULE,
    A,
    B,
    Open,
    begun,
    close,
    decodes_several_as_one_by_one,
    same_evidence,
    sets,
)
from tests.tiny import BOS

EVERY = {**HF, **NATIVE}
USUAL = ("hf-llama", "hf-opt", *NATIVE)  # where families would make no difference but time


def opened(names: Any) -> Any:
    """Backends by name, as parameters."""
    return pytest.mark.parametrize("opens", [EVERY[name] for name in names], ids=list(names))


@pytest.mark.parametrize(
    ("name", "chunk"),
    [*((name, 3) for name in EVERY), *((name, chunk) for name in USUAL for chunk in (1, 7))],
)
def test_a_chunked_prefill_equals_a_whole_one(name: str, chunk: int) -> None:
    opens = EVERY[name]
    whole, parts = begun(opens(), halves=True), begun(opens(prefill_chunk=chunk), halves=True)
    prompts = [[BOS, *A], B, A[::-1]]
    close(parts.prefill(prompts), whole.prefill(prompts), rtol=1e-4, atol=1e-4)
    for one, two in zip(parts.evidence(), whole.evidence(), strict=True):
        same_evidence(one, two)
    assert sets(parts.select(RULE)) == sets(whole.select(RULE))
    close(parts.decode([[1]] * 3), whole.decode([[1]] * 3), rtol=1e-4, atol=1e-4)


@opened(EVERY)
def test_a_prefill_in_several_calls_equals_one(opens: Open) -> None:
    backend = opens()
    whole, calls = begun(backend), begun(backend)
    calls.prefill([A[:4], B[:1]])
    calls.prefill([A[4:5], B[1:2]])
    logits = calls.prefill([A[5:], B[2:]])
    close(logits, whole.prefill([A, B]), rtol=1e-4, atol=1e-4)
    for one, two in zip(calls.evidence(), whole.evidence(), strict=True):
        same_evidence(one, two)
    assert sets(calls.select(RULE)) == sets(whole.select(RULE))
    for ids in ([[1], [2]], [[3], [4]]):
        close(calls.decode(ids), whole.decode(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [
        *((name, None) for name in EVERY),
        *((name, other) for name in ("hf-phi3", *USUAL) for other in (Mean(), Linear(rank=4))),
    ],
)
def test_a_batch_equals_each_alone(name: str, stand_in: StandIn | None) -> None:
    """Ten sequences: more than a native step computes at once."""
    prompts = [A, B, [BOS, 9], [7], A[::-1], [1, 2, 3, 4], [200], B + A, [3, 3], [9, 8, 7]]
    backend = EVERY[name]()
    batch = begun(backend, stand_in=stand_in)
    logits = batch.prefill(prompts)
    chosen = batch.select(RULE, stand_in)
    steps = [batch.decode([[t + i] for i in range(len(prompts))]) for t in (20, 90)]
    for row, prompt in enumerate(prompts):
        alone = begun(backend, stand_in=stand_in)
        close(alone.prefill([prompt])[0], logits[row], rtol=1e-4, atol=1e-4)
        same_evidence(alone.evidence()[0], batch.evidence()[row])
        assert sets(alone.select(RULE, stand_in)) == sets(chosen)[row : row + 1]
        for token, step in zip((20, 90), steps, strict=True):
            close(alone.decode([[token + row]])[0], step[row], rtol=1e-3, atol=1e-3)


@opened(EVERY)
def test_several_tokens_at_once_equal_one_by_one(opens: Open) -> None:
    decodes_several_as_one_by_one(begun(opens()))


@opened(EVERY)
def test_forks_do_not_touch_each_other(opens: Open) -> None:
    session = begun(opens())
    session.prefill([A])
    session.select(RULE)
    want = [session.fork().decode([[t]]) for t in (1, 2)]
    one, two = session.fork(), session.fork()
    one.decode([[3, 4, 5]], Phase.SCORE)
    assert torch.equal(two.decode([[2]]), want[1])
    assert torch.equal(session.decode([[1]]), want[0])


@opened(USUAL)
def test_one_prefill_serves_different_selectors(opens: Open) -> None:
    backend = opens()
    session = begun(backend)
    session.prefill([A])
    rules: list[Selector] = [RULE, Impact(beta=0.4), Griffin(beta=0.2), Stability(alpha=0.3)]
    forks = [session.fork() for _ in rules]
    chosen = [fork.select(rule) for fork, rule in zip(forks, rules, strict=True)]
    steps = [fork.decode([[1]]) for fork in forks]
    for rule, choice, step in zip(rules, chosen, steps, strict=True):
        alone = begun(backend)
        alone.prefill([A])
        assert sets(alone.select(rule)) == sets(choice)
        close(alone.decode([[1]]), step)
    assert len({str(sets(choice)) for choice in chosen[:3]}) == 3
    # The one they came from has chosen nothing, and is dense.
    dense = begun(backend)
    want = dense.prefill([[*A, 1]])[0]
    close(session.decode([[1]])[0, -1], want, rtol=1e-4, atol=1e-4)


@opened(USUAL)
def test_select_again_replaces_the_choice(opens: Open) -> None:
    session = begun(opens())
    session.prefill([A])
    first = session.fork()
    first.select(RULE)
    session.select(Impact(beta=0.2))
    session.select(RULE)
    assert torch.equal(session.decode([[1]]), first.decode([[1]]))


@opened(USUAL)
def test_a_plan_that_recorded_too_little_is_refused(opens: Open) -> None:
    session = begun(opens(), rule=Impact())
    session.prefill([A])
    with pytest.raises(ValueError, match="the prefill recorded"):
        session.select(RULE)


@opened(USUAL)
def test_a_fork_that_reads_on_leaves_the_statistics_of_the_other_alone(opens: Open) -> None:
    session = begun(opens(), stand_in=Linear(rank=2), halves=True)
    session.prefill([A])
    before = session.evidence()[0]
    fork = session.fork()
    fork.prefill([B])
    assert fork.evidence()[0].tokens == len(A) + len(B)
    same_evidence(session.evidence()[0], before, atol=0)
    session.prefill([B])
    same_evidence(session.evidence()[0], fork.evidence()[0], atol=0)


@opened(USUAL)
def test_empty_prompts_are_refused_and_empty_steps_are_nothing(opens: Open) -> None:
    backend = opens()
    session = begun(backend)
    with pytest.raises(UserError, match="the prompt is empty"):
        session.prefill([A, []])
    with pytest.raises(UserError, match="the prompt is empty"):
        begun(backend).prefill([[]])
    session.prefill([A, B])
    session.select(RULE)
    after = session.fork().decode([[1], [2]])
    assert session.decode([[], []]).shape == (2, 0, 260)
    with pytest.raises(UserError, match="prompt is empty"):
        session.prefill([[1], []])
    assert torch.equal(session.decode([[1], [2]]), after)  # neither has moved anything


@opened(USUAL)
def test_the_lone_beginning_of_sequence_token_counts(opens: Open) -> None:
    backend = opens()
    for prompt in ([BOS], [9]):
        session = begun(backend)
        session.prefill([prompt])
        assert session.evidence()[0].tokens == 1
