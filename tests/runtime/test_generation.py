"""The generation loop: what it yields, when it ends, and that it depends on nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coreinfer.backends.base import Backend
from coreinfer.backends.hf.session import HfBackend, HfSession
from coreinfer.errors import UserError
from coreinfer.runtime.generation import generate
from coreinfer.runtime.records import GenerationRecord
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.selectors import Dense, Impact, Oracle, Selector, Stability
from coreinfer.standins import Linear, StandIn
from tests.native.pairs import tiny_native
from tests.tiny import EOS, tiny_backend, tiny_model

PROMPTS = [[72, 101, 108, 108, 111, 32, 119], [65, 66], [200, 3, 7, 7, 9, 120, 31, 5, 88, 90, 17]]


def answers(
    backend: Backend,
    prompts: list[list[int]],
    selector: Selector,
    stand_in: StandIn | None = None,
    **sampling: object,
) -> list[GenerationRecord]:
    params = SamplingParams(**{"max_new_tokens": 12, **sampling})  # type: ignore[arg-type]
    pieces = generate(backend, prompts, selector, stand_in, params)
    return [piece.record for piece in pieces if piece.record is not None]


def hf_of_context(family: str, length: int) -> Backend:
    model = tiny_model(family, max_position_embeddings=length)
    return HfBackend(model, tiny_backend().tokenizer, "tiny")


def native_of_context(family: str, length: int) -> Backend:
    return tiny_native(family, changes={"max_position_embeddings": length})


@pytest.mark.parametrize("selector", [Dense(), Stability(beta=1.0), Impact(dense_layers=(0, 1, 2))])
def test_keeping_everything_is_transformers_greedy_answer(selector: Selector) -> None:
    backend = tiny_backend()
    for prompt in PROMPTS:
        (record,) = answers(backend, [prompt], selector)
        ids = torch.tensor([prompt])
        expected = backend.model.generate(ids, max_new_tokens=12, do_sample=False)
        assert record.token_ids == expected[0, len(prompt) :].tolist()
        assert record.density == 1.0
        assert record.bytes_per_token == record.dense_bytes_per_token == backend.cost.dense


@pytest.mark.parametrize("stand_in", [None, Linear(rank=4)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9}])
def test_a_prompt_answers_the_same_alone_and_in_a_batch(
    sampling: dict[str, object], stand_in: StandIn | None
) -> None:
    backend, selector = tiny_backend(), Stability(beta=0.5)
    together = answers(backend, PROMPTS, selector, stand_in, **sampling)
    alone = [answers(backend, [prompt], selector, stand_in, **sampling)[0] for prompt in PROMPTS]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_bytes_are_those_of_the_answer_whatever_goes_on_beside_it() -> None:
    backend, selector = tiny_backend(), Impact(beta=0.5, active=0.4)
    first = answers(backend, PROMPTS[:1], selector)[0].token_ids
    backend.model.generation_config.eos_token_id = [EOS, first[3]]
    together = answers(backend, PROMPTS, selector)
    alone = [answers(backend, [prompt], selector)[0] for prompt in PROMPTS]
    assert len({record.generated_tokens for record in alone}) > 1
    assert [r.bytes_per_token for r in together] == [r.bytes_per_token for r in alone]
    assert len({record.bytes_per_token for record in alone}) > 1


def test_the_seed_decides_what_is_sampled() -> None:
    backend, selector = tiny_backend(), Stability(beta=0.5)
    draw = [
        answers(backend, PROMPTS[:1], selector, temperature=1.5, seed=seed)[0].token_ids
        for seed in (0, 0, 1, 2)
    ]
    assert draw[0] == draw[1]
    assert len({tuple(tokens) for tokens in draw}) == 3


def test_chunked_prefill_answers_the_same() -> None:
    whole, chunked = tiny_backend(), tiny_backend(prefill_chunk=3)
    selector = Stability(beta=0.5)
    expected = [r.token_ids for r in answers(whole, PROMPTS, selector)]
    assert [r.token_ids for r in answers(chunked, PROMPTS, selector)] == expected


def test_the_record_says_what_was_done() -> None:
    backend = tiny_backend()
    selector = Stability(alpha=0.3, beta=0.25, dense_layers=(1,))
    stand_in = Linear(rank=2)
    (record,) = answers(backend, PROMPTS[:1], selector, stand_in)
    assert record.prompt_tokens == len(PROMPTS[0])
    assert record.generated_tokens == len(record.token_ids) == 12
    assert (record.selector, record.alpha, record.beta, record.gamma) == (
        "stability", 0.3, 0.25, None
    )  # fmt: skip
    assert record.dense_layers == [1]
    assert record.stand_in == "linear"
    assert record.density == pytest.approx((12 + 48 + 12) / (3 * 48))
    dropped, stand_in_weights = 2 * 36, 2 * (32 + 2 * 2 * 32)
    expected = backend.cost.dense - dropped * 3 * 32 * 4 + stand_in_weights * 4
    assert record.bytes_per_token == expected
    assert record.finish_reason == "length"
    assert min(record.prefill_s, record.select_s, record.decode_s) > 0
    assert record.decode_tokens_per_s is not None
    assert record.peak_memory_bytes > 1e6
    assert (record.backend, record.dtype, record.model) == ("hf", "float32", "tiny-llama")
    keys = set(record.to_json())
    assert keys >= {
        "prompt_tokens", "generated_tokens", "text", "token_ids", "finish_reason", "selector",
        "alpha", "beta", "dense_layers", "density", "bytes_per_token", "dense_bytes_per_token",
        "prefill_s", "select_s", "decode_s", "decode_tokens_per_s", "peak_memory_bytes", "backend",
        "dtype", "model",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("selector", "beta"),
    [
        (Impact(beta=0.3, budgets={0: 0.9, 1: 0.9}), 0.3),
        (Impact(beta=0.3, budgets={0: 0.9, 1: 0.9, 2: 0.9}), None),
        (Impact(beta=0.3, budgets={0: 0.9, 1: 0.9}, dense_layers=(2,)), None),
        (Dense(), 1.0),
    ],
)
def test_beta_is_told_only_where_some_layer_keeps_so_much(
    selector: Selector, beta: float | None
) -> None:
    (record,) = answers(tiny_backend(), PROMPTS[:1], selector, max_new_tokens=2)
    assert (record.beta, record.gamma) == (beta, None)


def test_generation_ends_at_the_end_of_sequence_token() -> None:
    backend = tiny_backend()
    tokens = answers(backend, PROMPTS[:1], Dense())[0].token_ids
    assert EOS not in tokens
    stop_at = tokens[4]
    first = tokens.index(stop_at)
    backend.model.generation_config.eos_token_id = [EOS, stop_at]
    (record,) = answers(backend, PROMPTS[:1], Dense())
    assert record.token_ids == tokens[: first + 1]
    assert record.finish_reason == "eos"
    (ignoring,) = answers(backend, PROMPTS[:1], Dense(), ignore_eos=True)
    assert ignoring.token_ids == tokens


def test_a_finished_sequence_does_not_disturb_its_neighbours() -> None:
    backend = tiny_backend()
    alone = [answers(backend, [p], Stability(beta=0.5))[0].token_ids for p in PROMPTS]
    backend.model.generation_config.eos_token_id = alone[0][1]
    for record, tokens in zip(answers(backend, PROMPTS, Stability(beta=0.5)), alone, strict=True):
        end = tokens.index(alone[0][1]) + 1 if alone[0][1] in tokens else len(tokens)
        assert record.token_ids == tokens[:end]


def test_the_answer_stays_inside_the_context() -> None:
    model = tiny_model(max_position_embeddings=16)
    backend = HfBackend(model, tiny_backend().tokenizer, "tiny")
    (record,) = answers(backend, [PROMPTS[2]], Stability())
    assert record.generated_tokens == 16 - len(PROMPTS[2])
    assert record.finish_reason == "length"
    with pytest.raises(UserError, match="the prompt has 16 tokens, tiny reads 16 at most"):
        answers(backend, [[1] * 16], Stability())


@pytest.mark.parametrize("make", [hf_of_context, native_of_context])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_answer_at_the_end_of_the_context_does_not_end_those_beside_it(
    make: Callable[[str, int], Backend], family: str
) -> None:
    """The first prompt leaves room for 2 tokens, the last for all that are asked for."""
    backend, prompts = make(family, 32), [[7, *range(29)], PROMPTS[0], PROMPTS[1]]
    for selector in (Dense(), Impact(beta=0.5), Impact(beta=0.5, active=0.4), Oracle(beta=0.5)):
        together = answers(backend, prompts, selector, Linear(rank=2))
        alone = [answers(backend, [prompt], selector, Linear(rank=2))[0] for prompt in prompts]
        assert [record.generated_tokens for record in together] == [2, 12, 12]
        assert [r.token_ids for r in together] == [r.token_ids for r in alone]
        assert [r.bytes_per_token for r in together] == [r.bytes_per_token for r in alone]


def test_an_answer_that_has_ended_is_fed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, fed = tiny_backend(), []
    first = answers(backend, PROMPTS[:1], Dense())[0].token_ids
    backend.model.generation_config.eos_token_id = [EOS, first[3]]
    decode = HfSession.decode

    def watched(session: HfSession, token_ids: list[list[int]]) -> Tensor:
        fed.append(token_ids)
        return decode(session, token_ids)

    monkeypatch.setattr(HfSession, "decode", watched)
    records = answers(backend, PROMPTS, Dense())
    assert records[0].generated_tokens == 4
    for row, record in enumerate(records):
        rows = [step[row] for step in fed]
        assert [token for tokens in rows for token in tokens] == record.token_ids[:-1]


def test_the_oracle_looks_at_the_dense_answer() -> None:
    backend = tiny_backend()
    (dense,) = answers(backend, PROMPTS[:1], Dense(), max_new_tokens=3)
    (record,) = answers(backend, PROMPTS[:1], Oracle(beta=1.0), max_new_tokens=3)
    assert record.token_ids == dense.token_ids
    (sparse,) = answers(backend, PROMPTS[:1], Oracle(beta=0.3), max_new_tokens=3)
    assert sparse.density == pytest.approx(round(0.3 * 48) / 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, got inf"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": float("nan")}, "top_p must be above 0"),
        ({"stop": ("",)}, "a stop text must not be empty"),
        ({"seed": -1}, "the seed must be 0 to 9223372036854775807, got -1"),
        ({"seed": 2**64}, "the seed must be"),
    ],
)
def test_sampling_settings_out_of_range_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**options)  # type: ignore[arg-type]
