"""Native sessions, beside those of hf; what any backend owes is in tests/backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coreinfer.backends.base import Phase
from coreinfer.backends.native.session import NativeSession, in_parts
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Oracle
from coreinfer.standins import StandIn
from tests.backends.sessions import (
    RULE,
    A,
    B,
    begun,
    close,
    decodes_several_as_one_by_one,
    same_evidence,
    sets,
)
from tests.native.pairs import VARIANTS, tiny_native, tiny_pair

FAMILIES = ["llama", "qwen3", "opt"]


def start(
    variant: str = "llama",
    stand_in: StandIn | None = None,
    **options: Any,
) -> NativeSession:
    session: NativeSession = begun(tiny_native(variant, **options), stand_in=stand_in)
    return session


def test_parts_hold_every_token_once_in_order() -> None:
    tokens = [list(range(7)), [], [10, 11], list(range(20, 33))]
    for size in (1, 2, 5, 22, 100):
        parts = list(in_parts(tokens, size))
        assert [[t for part in parts for t in part[row]] for row in range(4)] == tokens
        sizes = [sum(map(len, part)) for part in parts]
        assert all(n == size for n in sizes[:-1])
        assert 0 < sizes[-1] <= size


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_tokens_at_once_equal_one_by_one(variant: str, dtype: str) -> None:
    decodes_several_as_one_by_one(start(variant, dtype=dtype))


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


def test_the_length_of_a_prompt_grows_the_cache_without_touching_what_is_there() -> None:
    """Past the first room, in single steps, against one whole pass."""
    tokens = [(7 * i) % 250 for i in range(150)]
    grown, whole = start(), start()
    grown.prefill([tokens[:3]])
    for token in tokens[3:-1]:
        grown.decode([[token]])
    want = whole.prefill([tokens])
    close(grown.decode([tokens[-1:]])[:, -1], want, rtol=1e-4, atol=1e-4)
