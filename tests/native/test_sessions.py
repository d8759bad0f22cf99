"""Native sessions: one account however the tokens come in, forks that do not touch, turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from coreinfer.backends.base import Phase
from coreinfer.backends.native.session import NativeSession, in_parts
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Griffin, Impact, Oracle, Selector, Stability
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import Linear, Mean, StandIn
from tests.native.pairs import VARIANTS, tiny_native, tiny_pair
from tests.tiny import BOS

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]
RULE = Stability(alpha=0.3, beta=0.4)
FAMILIES = ["llama", "qwen3", "opt"]
close = torch.testing.assert_close


def start(
    variant: str = "llama",
    rule: Selector = RULE,
    stand_in: StandIn | None = None,
    halves: bool = False,
    **options: Any,
) -> NativeSession:
    plan = RecordingPlan.of(rule, stand_in)
    if halves:
        plan = RecordingPlan(alpha=plan.alpha, halves=True, sample_tokens=plan.sample_tokens)
    return tiny_native(variant, **options).start(plan)


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


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_chunked_prefill_equals_a_whole_one(variant: str, chunk: int) -> None:
    whole, parts = start(variant, halves=True), start(variant, halves=True, prefill_chunk=chunk)
    prompts = [[BOS, *A], B, A[::-1]]
    close(parts.prefill(prompts), whole.prefill(prompts), rtol=1e-4, atol=1e-4)
    for one, two in zip(parts.evidence(), whole.evidence(), strict=True):
        same_evidence(one, two)
    assert sets(parts.select(RULE)) == sets(whole.select(RULE))
    close(parts.decode([[1]] * 3), whole.decode([[1]] * 3), rtol=1e-4, atol=1e-4)


def test_parts_hold_every_token_once_in_order() -> None:
    tokens = [list(range(7)), [], [10, 11], list(range(20, 33))]
    for size in (1, 2, 5, 22, 100):
        parts = list(in_parts(tokens, size))
        assert [[t for part in parts for t in part[row]] for row in range(4)] == tokens
        sizes = [sum(map(len, part)) for part in parts]
        assert all(n == size for n in sizes[:-1])
        assert 0 < sizes[-1] <= size


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_prefill_in_several_calls_equals_one(variant: str) -> None:
    whole, calls = start(variant), start(variant)
    calls.prefill([A[:4], B[:1]])
    calls.prefill([A[4:5], B[1:2]])
    logits = calls.prefill([A[5:], B[2:]])
    close(logits, whole.prefill([A, B]), rtol=1e-4, atol=1e-4)
    for one, two in zip(calls.evidence(), whole.evidence(), strict=True):
        same_evidence(one, two)
    assert sets(calls.select(RULE)) == sets(whole.select(RULE))
    for ids in ([[1], [2]], [[3], [4]]):
        close(calls.decode(ids), whole.decode(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("stand_in", [None, Mean(), Linear(rank=4)])
def test_a_batch_equals_each_alone(variant: str, stand_in: StandIn | None) -> None:
    """Ten sequences: more than a step computes at once."""
    prompts = [A, B, [BOS, 9], [7], A[::-1], [1, 2, 3, 4], [200], B + A, [3, 3], [9, 8, 7]]
    batch = start(variant, stand_in=stand_in)
    logits = batch.prefill(prompts)
    chosen = batch.select(RULE, stand_in)
    steps = [batch.decode([[t + i] for i in range(len(prompts))]) for t in (20, 90)]
    for row, prompt in enumerate(prompts):
        alone = start(variant, stand_in=stand_in)
        close(alone.prefill([prompt])[0], logits[row], rtol=1e-4, atol=1e-4)
        same_evidence(alone.evidence()[0], batch.evidence()[row])
        assert sets(alone.select(RULE, stand_in)) == sets(chosen)[row : row + 1]
        for token, step in zip((20, 90), steps, strict=True):
            close(alone.decode([[token + row]])[0], step[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_tokens_at_once_equal_one_by_one(variant: str, dtype: str) -> None:
    session = start(variant, dtype=dtype)
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


def test_forks_do_not_touch_each_other() -> None:
    for variant in FAMILIES:
        session = start(variant)
        session.prefill([A])
        session.select(RULE)
        want = [session.fork().decode([[t]]) for t in (1, 2)]
        one, two = session.fork(), session.fork()
        one.decode([[3, 4, 5]], Phase.SCORE)
        assert torch.equal(two.decode([[2]]), want[1])
        assert torch.equal(session.decode([[1]]), want[0])
        assert [one.lengths, two.lengths] == [[len(A) + 3], [len(A) + 1]]
        assert session.lengths == [len(A) + 1]


def test_a_fork_costs_no_copy_of_the_cache() -> None:
    session = start()
    session.prefill([A])
    fork = session.fork()
    (own,), (other,) = session._caches, fork._caches
    before = own.data.data_ptr()
    assert other.data.data_ptr() == before
    fork.decode([[1]])  # the first to go on needs no copy either
    assert other.data.data_ptr() == before
    session.decode([[2]])
    assert own.data.data_ptr() != before


def test_a_sequence_that_is_fed_nothing_costs_nothing() -> None:
    session = start()
    session.prefill([A, B])
    session.fork().decode([[1], [2]])
    before = [cache.data.data_ptr() for cache in session._caches]
    session.decode([[], [3]])
    first, second = (cache.data.data_ptr() for cache in session._caches)
    assert (first, session.lengths) == (before[0], [len(A), len(B) + 1])
    assert second != before[1]


def test_one_prefill_serves_different_selectors() -> None:
    pair = tiny_pair()
    session = pair.native.start(RecordingPlan.of(RULE))
    session.prefill([A])
    rules: list[Selector] = [RULE, Impact(beta=0.4), Griffin(beta=0.2), Stability(alpha=0.3)]
    forks = [session.fork() for _ in rules]
    chosen = [fork.select(rule) for fork, rule in zip(forks, rules, strict=True)]
    steps = [fork.decode([[1]]) for fork in forks]
    for rule, choice, step in zip(rules, chosen, steps, strict=True):
        alone = start()
        alone.prefill([A])
        assert sets(alone.select(rule)) == sets(choice)
        close(alone.decode([[1]]), step)
    assert len({str(sets(choice)) for choice in chosen[:3]}) == 3
    # The one they came from has chosen nothing, and is dense.
    want = pair.hf.model(torch.tensor([[*A, 1]])).logits[0, -1]
    close(session.decode([[1]])[0, -1], want, rtol=1e-4, atol=1e-4)


def test_select_again_replaces_the_choice() -> None:
    session = start()
    session.prefill([A])
    first = session.fork()
    first.select(RULE)
    session.select(Impact(beta=0.2))
    session.select(RULE)
    assert torch.equal(session.decode([[1]]), first.decode([[1]]))


def test_a_plan_that_recorded_too_little_is_refused() -> None:
    session = start(rule=Impact())
    session.prefill([A])
    with pytest.raises(ValueError, match="the prefill recorded"):
        session.select(RULE)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("forking", [False, True])
def test_turns_are_those_of_hf(variant: str, forking: bool) -> None:
    """Two conversations of different lengths; what was decoded is in the cache, not counted."""
    pair = tiny_pair(variant)
    turns = [[A, B], [B, A[::-1]], [A[::-1], [4]]]
    native, hf = (one.start(RecordingPlan.of(RULE)) for one in (pair.native, pair.hf))
    for turn in turns:
        left = native
        if forking:
            native = native.fork()
        close(native.prefill(turn), hf.prefill(turn), rtol=1e-4, atol=1e-4)
        assert not forking or left.lengths != native.lengths
        assert sets(native.select(RULE)) == sets(hf.select(RULE))
        for ids in ([[1], [2]], [[3], [4]]):
            close(native.decode(ids), hf.decode(ids), rtol=1e-4, atol=1e-4)
    assert [e.tokens for e in native.evidence()] == [e.tokens for e in hf.evidence()]
    assert native.evidence()[0].tokens == sum(len(turn[0]) for turn in turns)


def test_a_fork_that_reads_on_leaves_the_statistics_of_the_other_alone() -> None:
    session = start(stand_in=Linear(rank=2), halves=True)
    session.prefill([A])
    before = session.evidence()[0]
    fork = session.fork()
    fork.prefill([B])
    assert fork.evidence()[0].tokens == len(A) + len(B)
    same_evidence(session.evidence()[0], before, atol=0)
    session.prefill([B])
    same_evidence(session.evidence()[0], fork.evidence()[0], atol=0)


def test_look_ahead_moves_nothing_and_sees_what_hf_sees() -> None:
    pair = tiny_pair()
    plan = RecordingPlan.of(RULE)
    session, plain, hf = pair.native.start(plan), pair.native.start(plan), pair.hf.start(plan)
    for one in (session, plain, hf):
        one.prefill([A, B])
    future = [[3, 4, 5, 6], [7]]
    session.look_ahead(future)
    hf.look_ahead(future)
    for row in range(2):
        ours, theirs = session.evidence()[row].future, hf.evidence()[row].future
        assert ours is not None
        assert theirs is not None
        for one, two in zip(ours, theirs, strict=True):
            assert one.tokens == two.tokens == len(future[row])
            close(one.square_sum, two.square_sum, rtol=1e-4, atol=1e-4)
        same_evidence(session.evidence()[row], plain.evidence()[row], atol=0)
    assert session.lengths == plain.lengths
    assert sets(session.fork().select(Oracle(beta=0.4))) == sets(hf.select(Oracle(beta=0.4)))
    session.select(RULE)
    plain.select(RULE)
    assert torch.equal(session.decode([[1], [2]]), plain.decode([[1], [2]]))
    session.prefill([[1], [2]])
    with pytest.raises(UserError, match="oracle"):  # that future is past
        session.select(Oracle())


def test_a_future_of_nothing_is_seen_as_such() -> None:
    session = start()
    session.prefill([A, B])
    session.look_ahead([[1, 2], []])
    future = session._recorded.futures
    assert future is not None
    assert [one.statistics()[0].tokens for one in future] == [2, 0]


def test_empty_prompts_are_refused_and_empty_steps_are_nothing() -> None:
    session = start()
    with pytest.raises(UserError, match="the prompt is empty"):
        session.prefill([A, []])
    with pytest.raises(UserError, match="the prompt is empty"):
        start().prefill([[]])
    session.prefill([A, B])
    session.select(RULE)
    assert session.decode([[], []]).shape == (2, 0, 260)
    assert session.lengths == [len(A), len(B)]
    with pytest.raises(UserError, match="prompt is empty"):
        session.prefill([[1], []])


def test_a_sequence_ends_where_the_model_stops_reading() -> None:
    session = start(changes={"max_position_embeddings": 16})
    session.prefill([A])
    session.decode([[1] * 5], Phase.SCORE)
    with pytest.raises(UserError, match="reads 16 tokens at most, this would be 17"):
        session.decode([[1]])
    with pytest.raises(UserError, match="reads 16 tokens"):
        session.prefill([[1, 2]])
    assert session.lengths == [16]


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    session = start()
    for ids in ([[260]], [[-1]]):
        with pytest.raises(UserError, match="vocabulary"):
            session.prefill(ids)


def test_the_lone_beginning_of_sequence_token_counts() -> None:
    session = start()
    session.prefill([[BOS]])
    assert session.evidence()[0].tokens == 1
    session.prefill([[9]])
    assert session.evidence()[0].tokens == 1


def test_the_length_of_a_prompt_grows_the_cache_without_touching_what_is_there() -> None:
    """Past the first room, in single steps, against one whole pass."""
    tokens = [(7 * i) % 250 for i in range(150)]
    grown, whole = start(), start()
    grown.prefill([tokens[:3]])
    for token in tokens[3:-1]:
        grown.decode([[token]])
    want = whole.prefill([tokens])
    close(grown.decode([tokens[-1:]])[:, -1], want, rtol=1e-4, atol=1e-4)
