"""Sessions of hf beside what hooks on the model see; what any backend owes: tests/backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coreinfer.backends.base import Phase
from coreinfer.backends.hf.session import HfBackend, HfSession
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Impact, Oracle
from coreinfer.standins import Linear, StandIn
from tests.backends.sessions import RULE, A, B, begun, close, same_evidence, sets
from tests.hf.reference import (
    activations,
    cache_of,
    core_set,
    hooked,
    masked,
    sparse_greedy,
)
from tests.tiny import BOS, tiny_backend, tiny_model, tiny_tokenizer


def start(
    family: str = "llama",
    stand_in: StandIn | None = None,
    **options: Any,
) -> HfSession:
    session: HfSession = begun(tiny_backend(family, **options), stand_in=stand_in)
    return session


def test_alibi_in_a_padded_batch() -> None:
    backend = HfBackend(tiny_model("falcon", alibi=True), tiny_tokenizer(), "t", prefill_chunk=4)
    batch = backend.start(RecordingPlan.of(RULE))
    logits = batch.prefill([A, B])
    chosen = sets(batch.select(RULE))
    steps = batch.decode([[1, 2], [1, 2]])
    for row, prompt in enumerate((A, B)):
        alone = backend.start(RecordingPlan.of(RULE))
        close(alone.prefill([prompt])[0], logits[row], rtol=1e-4, atol=1e-4)
        assert sets(alone.select(RULE)) == chosen[row : row + 1]
        close(alone.decode([[1, 2]])[0], steps[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_sliding_windows(family: str) -> None:
    """A prompt longer than the window, padded, chunked, and decoded further."""
    model = tiny_model(family, sliding_window=5)
    for chunk in (2, 100):
        backend = HfBackend(model, tiny_tokenizer(), "t", prefill_chunk=chunk)
        session = backend.start(RecordingPlan.of(RULE))
        first = session.prefill([A, B])
        chosen = sets(session.select(RULE))
        for row, prompt in enumerate((A, B)):
            kept = {i: core_set(h, 0.3, 0.4) for i, (_, h) in enumerate(activations(model, prompt))}
            assert chosen[row] == kept
            tokens, logits = sparse_greedy(model, prompt, kept, 6)
            close(first[row], logits[0], rtol=1e-4, atol=1e-4)
            fork = session.fork()
            for token, want in zip(tokens, logits[1:], strict=False):
                close(fork.decode([[token], [token]])[row, -1], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="attends to 5 tokens"):
        session.prefill([[1, 2], [3]])
    session.prefill([[1, 2], [3, 4]])


def test_a_fork_costs_no_copy_of_the_cache() -> None:
    session = start()
    session.prefill([A])
    fork = session.fork()
    for own, other in zip(session._cache.layers, fork._cache.layers, strict=True):
        assert own.keys.data_ptr() == other.keys.data_ptr()
        assert own is not other


@torch.no_grad()
def _turns(model: Any, turns: list[list[int]], answers: list[list[int]]) -> tuple[list[Any], Any]:
    """By hooks: each turn dense, its answer with the core set of all turns; logits of all."""
    seen: dict[int, list[Tensor]] = {}
    cache: dict[str, Any] = {}
    logits, kept = [], {}
    for turn, answer in zip(turns, answers, strict=True):
        with hooked(model, lambda i, h: seen.setdefault(i, []).append(h.reshape(-1, h.shape[-1]))):
            out = model(torch.tensor([turn]), **({"use_cache": True} | cache))
        logits.append(out.logits[0, -1])
        kept = {i: core_set(torch.cat(hs), 0.3, 0.4) for i, hs in seen.items()}
        with masked(model, kept):
            for token in answer:
                out = model(torch.tensor([[token]]), **cache_of(model, out))
                logits.append(out.logits[0, -1])
        cache = cache_of(model, out)
    return logits, kept


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "gpt_neox"])
@pytest.mark.parametrize("forking", [False, True])
def test_turns_add_up(family: str, forking: bool) -> None:
    """A further turn is dense; what was decoded stays in the cache and is not counted."""
    turns, answers = [A, B, A[::-1]], [[1, 2, 3], [4], [5, 6]]
    session = start(family)
    want, kept = _turns(session._backend.model, turns, answers)
    got = []
    for turn, answer in zip(turns, answers, strict=True):
        if forking:
            left, session = session, session.fork()
        got.append(session.prefill([turn])[0])
        if forking:  # the one it came from stays where it was
            assert left.length == session.length - len(turn)
        (choice,) = session.select(RULE)
        if forking:
            session = session.fork()
        got += [session.decode([[token]])[0, -1] for token in answer]
    close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-4)
    assert sets([choice]) == [kept]
    assert session.evidence()[0].tokens == sum(map(len, turns))


def test_look_ahead_moves_nothing() -> None:
    session, plain = start(), start()
    for one in (session, plain):
        one.prefill([A, B])
    future = [[3, 4, 5, 6], [7, 8]]
    session.look_ahead(future)
    for row, (prompt, follow) in enumerate(zip((A, B), future, strict=True)):
        evidence = session.evidence()[row]
        assert evidence.future is not None
        model = session._backend.model
        for stats, (_, h) in zip(evidence.future, activations(model, prompt + follow), strict=True):
            ahead = h[len(prompt) :].double()
            assert stats.tokens == len(follow)
            close(stats.square_sum, ahead.square().sum(dim=0), rtol=1e-4, atol=1e-4)
        same_evidence(evidence, plain.evidence()[row], atol=0)
    assert session.length == plain.length
    oracle = session.fork()
    assert sets(oracle.select(Oracle(beta=0.4))) != sets(session.fork().select(Impact(beta=0.4)))
    session.select(RULE)
    plain.select(RULE)
    assert torch.equal(session.decode([[1], [2]]), plain.decode([[1], [2]]))
    session.prefill([[1], [2]])
    with pytest.raises(UserError, match="oracle"):  # that future is past
        session.select(Oracle())


def test_the_last_prompt_token_is_fed_once() -> None:
    """The prefill's logits give the first token; the cache then holds the prompt and no more."""
    session = start()
    model = session._backend.model
    logits = session.prefill([A])
    assert session.length == session._cache.get_seq_length() == len(A)
    close(logits[0], model(torch.tensor([A])).logits[0, -1], rtol=1e-5, atol=1e-5)
    first = int(logits.argmax())
    positions = []

    def see(_m: Any, _a: Any, kwargs: Any) -> None:
        positions.append((kwargs["input_ids"].tolist(), kwargs["position_ids"].tolist()))

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    step = session.decode([[first]])
    handle.remove()
    assert positions == [([[first]], [[len(A)]])]
    assert session._cache.get_seq_length() == len(A) + 1
    want = model(torch.tensor([[*A, first]])).logits[0, -1]
    close(step[0, -1], want, rtol=1e-4, atol=1e-4)


def test_the_lone_beginning_of_sequence_token_counts() -> None:
    session = start()
    session.prefill([[BOS]])
    assert session.evidence()[0].tokens == 1
    (choice,) = session.select(RULE)
    h = activations(session._backend.model, [BOS])
    assert sets([choice]) == [{i: core_set(x[1], 0.3, 0.4) for i, x in enumerate(h)}]


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2"])
@pytest.mark.parametrize("stand_in", [None, Linear(rank=4)])
def test_sequences_that_are_fed_nothing_do_not_touch_the_others(
    family: str, stand_in: StandIn | None
) -> None:
    batch, alone = start(family, stand_in=stand_in), start(family, stand_in=stand_in)
    batch.prefill([A, B, A[::-1]])
    batch.select(RULE, stand_in)
    alone.prefill([B])
    alone.select(RULE, stand_in)
    for fed in ([[5], [1], [6]], [[], [2], [7]], [[], [3], []], [[], [4, 5], []]):
        want = alone.decode(fed[1:2])[0]
        close(batch.decode(fed)[1], want, rtol=1e-3, atol=1e-3)


def test_core_neurons_of_sequences_that_are_fed_nothing_are_not_read() -> None:
    session = start(stand_in=Linear(rank=4))
    session.prefill([A, B])
    session.select(RULE, Linear(rank=4))
    want = session.fork().decode([[1], [2]])
    for compact in session.compact.values():
        for linear in (*compact.inputs, compact.output, compact.left, compact.right):
            assert linear is not None
            linear.weight[1] = torch.nan
    got = session.decode([[1], []])
    close(got[0], want[0], rtol=1e-4, atol=1e-4)
    assert got.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_sequence_ends_where_the_model_stops_reading(family: str) -> None:
    model = tiny_model(family, max_position_embeddings=16)
    session = HfBackend(model, tiny_tokenizer(), "t").start(RecordingPlan.of(RULE))
    session.prefill([A, B])
    session.decode([[1] * 5, [1]], Phase.SCORE)
    with pytest.raises(UserError, match="reads 16 tokens at most, this would be 17"):
        session.decode([[1], []])
    with pytest.raises(UserError, match="reads 16 tokens"):
        session.prefill([[1, 2], [3]])
    session.decode([[], [4]])
    assert session.evidence()[0].tokens == len(A)
