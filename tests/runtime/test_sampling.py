"""Drawing tokens: every rule against its definition, and against transformers' own generate."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.conversation import Conversation
from coreinfer.runtime.generation import generate, prefill
from coreinfer.runtime.sampling import Sampler, SamplingParams
from coreinfer.selectors import Dense
from tests.tiny import tiny_backend

PROMPT = [5, 77, 200, 13, 13, 8, 250]
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


def drawn(logits: Tensor, so_far: list[int] | None = None, **params: Any) -> Counter[int]:
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, **params}))
    return Counter(sampler(logits, so_far or []) for _ in range(2000))


def answer(params: SamplingParams) -> list[int]:
    pieces = generate(tiny_backend(), [PROMPT], Dense(), params=params)
    (record,) = [piece.record for piece in pieces if piece.record is not None]
    return record.token_ids


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.floats(0.01, 1))
def test_min_p_keeps_what_is_likely_enough(values: list[float], min_p: float) -> None:
    logits = torch.tensor(values)
    chances = logits.softmax(dim=-1)
    sampler = Sampler(SamplingParams(temperature=1.0, min_p=min_p))
    for _ in range(20):
        assert chances[sampler(logits)] >= min_p * chances.max() * (1 - 1e-4)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    st.floats(0, 1e300, exclude_min=True),
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}]),
)
@example([3.0, 5.0, -2.0], 1e-40, {})
@example([3.0, 5.0, -2.0], 5e-324, {"top_p": 0.5})
def test_any_temperature_draws_a_token(
    values: list[float], temperature: float, more: dict[str, Any]
) -> None:
    logits = torch.tensor(values)
    token = Sampler(SamplingParams(temperature=temperature, **more))(logits)
    assert 0 <= token < len(values)
    if temperature < 1e-30:
        assert logits[token] == logits.max()


def test_min_p_at_its_ends() -> None:
    assert set(drawn(LOGITS, min_p=1.0)) == {0}
    assert set(drawn(LOGITS, min_p=0.0)) == set(range(5))
    assert set(drawn(LOGITS, min_p=0.3)) == {0, 1}  # exp(-1) = 0.37, exp(-1.5) = 0.22
    # Relative to the warmed chances: at half the temperature the gaps double.
    assert set(drawn(LOGITS, min_p=0.3, temperature=0.5)) == {0}


@given(
    st.lists(st.floats(-20, 20), min_size=4, max_size=30),
    st.lists(st.integers(0, 3), max_size=6),
    st.floats(0.5, 3),
)
def test_the_repetition_penalty_is_its_formula(
    values: list[float], so_far: list[int], penalty: float
) -> None:
    expected = torch.tensor(values)
    for token in set(so_far):  # once, however often it came
        expected[token] *= penalty if expected[token] < 0 else 1 / penalty
    token = Sampler(SamplingParams(repetition_penalty=penalty))(torch.tensor(values), so_far)
    assert expected[token] >= expected.max() - 1e-5


def test_a_penalty_of_one_is_none_and_a_large_one_forbids() -> None:
    assert Sampler(SamplingParams())(LOGITS, [0]) == 0
    assert Sampler(SamplingParams(repetition_penalty=1.0))(LOGITS, [0, 1]) == 0
    assert Sampler(SamplingParams(repetition_penalty=3.0))(LOGITS, [0]) == 1
    assert Sampler(SamplingParams(repetition_penalty=0.1))(LOGITS, [2]) == 2
    assert drawn(LOGITS, [0], repetition_penalty=50.0)[0] < drawn(LOGITS)[0]
    assert torch.equal(LOGITS, torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0]))  # not written to


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.3}, {"repetition_penalty": 1.05}, {"repetition_penalty": 0.8}],
)
def test_penalised_greedy_answers_are_those_of_transformers(options: dict[str, float]) -> None:
    ours = answer(SamplingParams(max_new_tokens=16, ignore_eos=True, **options))
    model = tiny_backend().model
    theirs = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        **options,
    )
    assert ours == theirs[0, len(PROMPT) :].tolist()
    assert ours != answer(SamplingParams(max_new_tokens=16, ignore_eos=True))


def test_each_sequence_is_penalised_for_its_own_tokens() -> None:
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, repetition_penalty=1.5)
    prompts = [PROMPT, [90, 91]]

    def answers(of: list[list[int]]) -> list[list[int]]:
        pieces = generate(tiny_backend(), of, Dense(), params=params)
        return [piece.record.token_ids for piece in pieces if piece.record is not None]

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


def test_what_was_read_is_known_over_the_turns_of_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty of the second turn covers the first turn and its answer."""
    seen: list[list[int]] = []
    original = Sampler.__call__

    def spy(self: Sampler, logits: Tensor, so_far: Any = ()) -> int:
        seen.append(list(so_far))
        return original(self, logits, so_far)

    monkeypatch.setattr(Sampler, "__call__", spy)
    backend = tiny_backend(chat=True)
    talk = Conversation(backend)
    params = SamplingParams(max_new_tokens=5, repetition_penalty=1.2)
    for words in ("ab", "cd"):
        list(talk.reply(words, Dense(), params=params))
    text = backend.tokenizer.decode(seen[-1])
    assert text.count("assistant: ") == 2
    assert "user: ab" in text
    assert "user: cd" in text
    assert len(seen[-1]) > len(seen[0])


def test_prefilled_tokens_are_those_read() -> None:
    read = prefill(tiny_backend(), [PROMPT, [1]], RecordingPlan())
    assert read.tokens == [PROMPT, [1]]
    assert read.prompt_tokens == [len(PROMPT), 1]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"min_p": -0.1}, "min_p must be 0 (all) to 1, got -0.1"),
        ({"min_p": 1.1}, "min_p must be 0 (all) to 1, got 1.1"),
        ({"min_p": float("nan")}, "min_p must be 0 (all) to 1, got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 (1 is none), got 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be above 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**params)
    assert says in str(error.value)
