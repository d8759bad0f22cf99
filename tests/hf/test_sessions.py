"""Sessions: one account however the tokens come in, forks that do not touch, turns that add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from coreinfer.backends.base import Phase
from coreinfer.backends.hf.session import HfBackend, HfSession
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.selectors import Griffin, Impact, Oracle, Selector, Stability
from coreinfer.selectors.evidence import Evidence
from coreinfer.standins import Linear, Mean, StandIn
from tests.hf.reference import (
    activations,
    cache_of,
    core_set,
    hooked,
    masked,
    sparse_greedy,
)
from tests.tiny import BOS, CONFIGS, tiny_backend, tiny_model, tiny_tokenizer

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]
RULE = Stability(alpha=0.3, beta=0.4)
close = torch.testing.assert_close


def start(
    family: str = "llama",
    rule: Selector = RULE,
    stand_in: StandIn | None = None,
    halves: bool = False,
    **options: Any,
) -> HfSession:
    plan = RecordingPlan.of(rule, stand_in)
    if halves:
        plan = RecordingPlan(alpha=plan.alpha, halves=True, sample_tokens=plan.sample_tokens)
    return tiny_backend(family, **options).start(plan)


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


@pytest.mark.parametrize(
    ("family", "chunk"),
    [*((family, 3) for family in CONFIGS), *((f, c) for f in ("llama", "opt") for c in (1, 7))],
)
def test_a_chunked_prefill_equals_a_whole_one(family: str, chunk: int) -> None:
    whole, parts = start(family, halves=True), start(family, halves=True, prefill_chunk=chunk)
    prompts = [[BOS, *A], B, A[::-1]]
    close(parts.prefill(prompts), whole.prefill(prompts), rtol=1e-4, atol=1e-4)
    for one, two in zip(parts.evidence(), whole.evidence(), strict=True):
        same_evidence(one, two)
    assert sets(parts.select(RULE)) == sets(whole.select(RULE))
    close(parts.decode([[1]] * 3), whole.decode([[1]] * 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_prefill_in_several_calls_equals_one(family: str) -> None:
    whole, calls = start(family), start(family)
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
    ("family", "stand_in"),
    [
        *((family, None) for family in CONFIGS),
        *((family, other) for family in ("phi3", "opt") for other in (Mean(), Linear(rank=4))),
    ],
)
def test_a_batch_equals_each_alone(family: str, stand_in: StandIn | None) -> None:
    prompts = [A, B, [BOS, 9], [7]]
    batch = start(family, stand_in=stand_in)
    logits = batch.prefill(prompts)
    chosen = batch.select(RULE, stand_in)
    steps = [batch.decode([[t + i] for i in range(4)]) for t in (20, 90)]
    for row, prompt in enumerate(prompts):
        alone = start(family, stand_in=stand_in)
        close(alone.prefill([prompt])[0], logits[row], rtol=1e-4, atol=1e-4)
        same_evidence(alone.evidence()[0], batch.evidence()[row])
        assert sets(alone.select(RULE, stand_in)) == sets(chosen)[row : row + 1]
        for token, step in zip((20, 90), steps, strict=True):
            close(alone.decode([[token + row]])[0], step[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_several_tokens_at_once_equal_one_by_one(family: str) -> None:
    session = start(family)
    session.prefill([A, B])
    session.select(RULE)
    at_once = session.fork().decode([[4, 5, 6], [7, 8]], Phase.SCORE)
    one_by_one = torch.cat([session.decode([[a], [b]]) for a, b in ((4, 7), (5, 8), (6, 9))], 1)
    close(at_once[0], one_by_one[0], rtol=1e-4, atol=1e-4)
    close(at_once[1, :2], one_by_one[1, :2], rtol=1e-4, atol=1e-4)


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


def test_forks_do_not_touch_each_other() -> None:
    for family in CONFIGS:
        session = start(family)
        session.prefill([A])
        session.select(RULE)
        want = [session.fork().decode([[t]]) for t in (1, 2)]
        one, two = session.fork(), session.fork()
        one.decode([[3, 4, 5]], Phase.SCORE)
        assert torch.equal(two.decode([[2]]), want[1])
        assert torch.equal(session.decode([[1]]), want[0])
        assert (session.length, one.length, two.length) == (len(A) + 1, len(A) + 3, len(A) + 1)


def test_a_fork_costs_no_copy_of_the_cache() -> None:
    session = start()
    session.prefill([A])
    fork = session.fork()
    for own, other in zip(session._cache.layers, fork._cache.layers, strict=True):
        assert own.keys.data_ptr() == other.keys.data_ptr()
        assert own is not other


def test_one_prefill_serves_different_selectors() -> None:
    session = start()
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
    model = session._backend.model
    want = model(torch.tensor([[*A, 1]])).logits[0, -1]
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


def test_empty_prompts_are_refused_and_empty_steps_are_nothing() -> None:
    session = start()
    with pytest.raises(UserError, match="the prompt is empty"):
        session.prefill([A, []])
    with pytest.raises(UserError, match="the prompt is empty"):
        start().prefill([[]])
    session.prefill([A, B])
    session.select(RULE)
    assert session.decode([[], []]).shape == (2, 0, 260)
    assert session.length == len(A)
    with pytest.raises(UserError, match="prompt is empty"):
        session.prefill([[1], []])


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
