"""Scoring: the log-likelihood that token-by-token sparse decoding gives, batched."""

from __future__ import annotations

import pytest
import torch

from coreinfer.backends.hf.session import HfBackend
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime import scoring
from coreinfer.runtime.generation import generate, prefill
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.runtime.scoring import Pair, score, score_choices
from coreinfer.selectors import Dense, Oracle, Random, Selector, Stability
from coreinfer.standins import Linear, StandIn
from tests.tiny import tiny_backend, tiny_model

TEXTS = [
    ("The quick brown fox jumps", " over the lazy dog"),
    ("One", " x"),
    ("To be or not to be, that is", " the question: whether"),
]


def pairs_of(backend: HfBackend) -> list[Pair]:
    return [Pair.of(backend, *texts) for texts in TEXTS]


def one_by_one(
    backend: HfBackend, pair: Pair, selector: Selector, stand_in: StandIn | None
) -> tuple[float, bool]:
    """The same by decoding token after token."""
    session = backend.start(RecordingPlan.of(selector, stand_in))
    logits = session.prefill([pair.context], [pair.text])
    session.select(selector, stand_in)
    total, greedy = 0.0, True
    for token in pair.continuation:
        total += float(logits[0].double().log_softmax(dim=-1)[token])
        greedy &= int(logits[0].argmax()) == token
        logits = session.decode([[token]])[:, -1]
    return total, greedy


@pytest.mark.parametrize("stand_in", [None, Linear(rank=3)])
@pytest.mark.parametrize("model_type", ["llama", "opt", "phi3", "gpt2"])
def test_a_score_is_that_of_token_by_token_decoding(
    model_type: str, stand_in: StandIn | None
) -> None:
    backend, selector = tiny_backend(model_type), Stability(beta=0.4)
    pairs = pairs_of(backend)
    for pair, result in zip(pairs, score(backend, pairs, selector, stand_in), strict=True):
        logprob, greedy = one_by_one(backend, pair, selector, stand_in)
        assert result.logprob == pytest.approx(logprob, rel=1e-4, abs=1e-4)
        assert result.greedy == greedy
        assert result.num_tokens == len(pair.continuation)
        assert result.density == pytest.approx(round(0.4 * 48) / 48)


def test_a_continuation_is_scored_sparsely_not_densely() -> None:
    backend = tiny_backend()
    pairs = pairs_of(backend)
    dense, sparse = (score(backend, pairs, s) for s in (Dense(), Random(beta=0.1)))
    for a, b, pair in zip(dense, sparse, pairs, strict=True):
        if len(pair.continuation) > 2:
            assert abs(a.logprob - b.logprob) > 1e-3
        assert a.density == 1.0
        assert b.density < 0.2


def test_dense_scores_are_those_of_the_plain_model() -> None:
    backend = tiny_backend()
    for pair in pairs_of(backend):
        (result,) = score(backend, [pair], Dense())
        ids = torch.tensor([pair.context + pair.continuation])
        logprobs = backend.model(ids).logits[0].double().log_softmax(dim=-1)
        at = range(len(pair.context) - 1, ids.shape[1] - 1)
        expected = sum(float(logprobs[i, ids[0, i + 1]]) for i in at)
        assert result.logprob == pytest.approx(expected, abs=1e-4)


def test_long_continuations_are_scored_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, selector = tiny_backend(), Stability(beta=0.4)
    whole = score(backend, pairs_of(backend), selector)
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * 3 * 260 * 5)  # five columns at a time
    sliced = score(backend, pairs_of(backend), selector)
    for a, b in zip(whole, sliced, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert (a.greedy, a.num_tokens) == (b.greedy, b.num_tokens)


def test_the_greedy_answer_scores_as_greedy() -> None:
    backend, selector = tiny_backend(), Stability(beta=0.4)
    context = list(b"some context")
    params = SamplingParams(max_new_tokens=6)
    *_, last = generate(backend, [context], selector, params=params)
    assert last.record is not None
    pair = Pair(context, last.record.token_ids, "some context")
    other = Pair(context, [(last.record.token_ids[0] + 1) % 256], "some context")
    assert [s.greedy for s in score(backend, [pair, other], selector)] == [True, False]


def test_the_oracle_chooses_from_the_continuation() -> None:
    backend = tiny_backend()
    pairs = pairs_of(backend)
    full, part = (score(backend, pairs, Oracle(beta=b)) for b in (1.0, 0.3))
    dense = score(backend, pairs, Dense())
    assert [s.logprob for s in full] == pytest.approx([s.logprob for s in dense], abs=1e-4)
    assert all(s.density < 0.4 for s in part)


def test_no_pairs_no_scores() -> None:
    assert score(tiny_backend(), [], Stability()) == []


def test_a_pair_beyond_the_context_is_refused() -> None:
    backend = HfBackend(tiny_model(max_position_embeddings=8), tiny_backend().tokenizer, "tiny")
    Pair.of(backend, "1234", "5678")
    with pytest.raises(UserError, match="have 9 tokens, tiny reads 8 at most"):
        Pair.of(backend, "1234", "56789")


@pytest.mark.parametrize("stand_in", [None, Linear(rank=3)])
@pytest.mark.parametrize("selector", [Dense(), Stability(beta=0.4), Oracle(beta=0.3)])
def test_choices_of_one_context_score_as_if_alone(
    selector: Selector, stand_in: StandIn | None
) -> None:
    backend = tiny_backend()
    contexts = ["The quick brown fox", "One", "To be or not"]
    choices = [[" jumps", " over the dog", " x"], [" two"], [" to be", " at all"]]
    pairs = [
        [Pair.of(backend, context, choice) for choice in row]
        for context, row in zip(contexts, choices, strict=True)
    ]
    read = prefill(backend, [row[0].context for row in pairs], RecordingPlan.of(selector, stand_in))
    tokens = [[pair.continuation for pair in row] for row in pairs]
    found = score_choices(backend, read, tokens, selector, stand_in)
    assert len(found) == 3
    for row, scores in zip(pairs, found, strict=True):
        assert len(scores) == len(row)
        for pair, got in zip(row, scores, strict=True):
            (alone,) = score(backend, [pair], selector, stand_in)
            assert got.logprob == pytest.approx(alone.logprob, abs=1e-4)
            assert (got.num_tokens, got.greedy) == (alone.num_tokens, alone.greedy)
            assert got.density == pytest.approx(alone.density)
