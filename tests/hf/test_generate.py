"""transformers' own `generate` inside `sparse`, against the masked reference."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, TextIteratorStreamer, TextStreamer

from coreinfer.backends.base import Phase
from coreinfer.backends.hf.sparse import SparseRun, sparse
from coreinfer.errors import UserError
from coreinfer.selectors import Impact, Oracle, Stability
from tests.hf.reference import activations, cache_of, core_set, hooked, masked, sparse_greedy
from tests.tiny import PAD, tiny_model, tiny_tokenizer

A = [5, 77, 200, 13, 13, 8, 250, 99, 41, 5, 77]
B = [90, 91, 200]
RULE = Stability(alpha=0.3, beta=0.4)
STEPS = 9


def make(family: str = "llama", **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and a twin for the reference that is never inside `sparse`."""
    model = tiny_model(family, **changes)
    model.generation_config.eos_token_id = None
    return model, copy.deepcopy(model)


def kept_of(model: PreTrainedModel, *prompts: list[int]) -> dict[int, list[int]]:
    """The core set of all that was prefilled, turns after one another in one context."""
    ids = [token for prompt in prompts for token in prompt]
    return {i: core_set(h, 0.3, 0.4) for i, (_, h) in enumerate(activations(model, ids))}


def expected(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    return sparse_greedy(model, prompt, kept_of(model, prompt), STEPS)[0]


def sets(run: SparseRun, prompt: int = 0) -> dict[int, list[int]]:
    return {i: t.tolist() for i, t in run.choices[prompt].core_set.layers.items()}


def greedy(model: PreTrainedModel, ids: Any, **options: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": PAD} | options
    return model.generate(torch.tensor(ids), **options)


def padded(*prompts: list[int]) -> tuple[list[list[int]], Tensor]:
    width = max(map(len, prompts))
    ids = [[PAD] * (width - len(p)) + p for p in prompts]
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "falcon"])
def test_a_left_padded_batch_equals_each_alone(family: str) -> None:
    model, plain = make(family)
    alone = [expected(plain, A), expected(plain, B), expected(plain, A[::-1])]
    ids, mask = padded(A, B, A[::-1])
    with sparse(model, RULE) as run:
        out = greedy(model, ids, attention_mask=mask)
        assert [sets(run, i) for i in range(3)] == [kept_of(plain, p) for p in (A, B, A[::-1])]
    assert out[:, len(A) :].tolist() == alone


def test_sampling_draws_what_the_reference_draws() -> None:
    model, plain = make()
    torch.manual_seed(3)

    def draw(logits: Tensor) -> int:
        return int(torch.multinomial(logits.softmax(dim=-1).unsqueeze(0), 1))

    tokens, _ = sparse_greedy(plain, A, kept_of(plain, A), STEPS, draw)
    with sparse(model, RULE):
        torch.manual_seed(3)
        out = greedy(model, [A], do_sample=True, top_k=0)
    assert out[0, len(A) :].tolist() == tokens


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
    ],
)
def test_beams_and_returned_sequences(options: dict[str, Any]) -> None:
    """transformers' own search over a model whose activations are masked, prompt by prompt."""
    model, plain = make()
    ids, mask = padded(A, B)
    both = {}
    for name, prompt in (("A", A), ("B", B)):
        kept = kept_of(plain, prompt)
        decoding: list[Any] = []
        prefill = model._prefill

        def then_mask(*args: Any, prefill: Any = prefill, kept: Any = kept, **more: Any) -> Any:
            out = prefill(*args, **more)
            decoding.append(masked(model, kept))  # noqa: B023
            decoding[-1].__enter__()  # noqa: B023
            return out

        model.__dict__["_prefill"] = then_mask
        torch.manual_seed(5)
        both[name] = greedy(model, [prompt], **options)[:, len(prompt) :].tolist()
        decoding.pop().__exit__(None, None, None)
        del model.__dict__["_prefill"]
    with sparse(model, RULE) as run:
        for name, prompt in (("A", A), ("B", B)):
            torch.manual_seed(5)
            out = greedy(model, [prompt], **options)
            assert out[:, len(prompt) :].tolist() == both[name]
            assert len(run.choices) == 1
        if not options.get("do_sample"):
            out = greedy(model, ids, attention_mask=mask, **options)
            assert out[:, len(A) :].tolist() == both["A"] + both["B"]
            assert [sets(run, 0), sets(run, 1)] == [kept_of(plain, A), kept_of(plain, B)]


def test_streamers(capsys: pytest.CaptureFixture[str]) -> None:
    model, plain = make()
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(expected(plain, A))
    with sparse(model, RULE):
        greedy(model, [A], streamer=TextStreamer(tokenizer, skip_prompt=True))
        assert capsys.readouterr().out == text + "\n"
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
        thread = threading.Thread(target=greedy, args=(model, [A]), kwargs={"streamer": streamer})
        thread.start()
        assert "".join(streamer) == text
        thread.join()


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 1}, {"prefill_chunk_size": 4}])
def test_chunked_prefill(family: str, options: dict[str, Any]) -> None:
    model, plain = make(family)
    with sparse(model, RULE) as run:
        out = greedy(model, [A], **options)
        assert sets(run) == kept_of(plain, A)
    assert out[0, len(A) :].tolist() == expected(plain, A)


def test_chunked_prefill_of_a_padded_batch() -> None:
    model, plain = make()
    ids, mask = padded(A, B)
    with sparse(model, RULE) as run:
        out = greedy(model, ids, attention_mask=mask, prefill_chunk_size=3)
        assert [sets(run, 0), sets(run, 1)] == [kept_of(plain, A), kept_of(plain, B)]
    assert out[:, len(A) :].tolist() == [expected(plain, A), expected(plain, B)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_static_cache(family: str) -> None:
    model, plain = make(family)
    with sparse(model, RULE) as run:
        out = greedy(model, [A], cache_implementation="static")
        assert sets(run) == kept_of(plain, A)
    assert out[0, len(A) :].tolist() == expected(plain, A)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_a_prompt_longer_than_the_sliding_window(family: str, options: dict[str, Any]) -> None:
    model, plain = make(family, sliding_window=5)
    with sparse(model, RULE) as run:
        out = greedy(model, [A], **options)
        assert sets(run) == kept_of(plain, A)
    assert out[0, len(A) :].tolist() == expected(plain, A)


def test_inputs_embeds() -> None:
    model, plain = make()
    embeds = model.get_input_embeddings()(torch.tensor([A])).detach()
    with sparse(model, RULE) as run:
        out = model.generate(inputs_embeds=embeds, max_new_tokens=STEPS, do_sample=False)
        assert sets(run) == kept_of(plain, A)
    assert out[0].tolist() == expected(plain, A)


def test_two_calls_in_a_block_and_max_length() -> None:
    model, plain = make()
    with sparse(model, RULE) as run:
        assert greedy(model, [A])[0, len(A) :].tolist() == expected(plain, A)
        assert greedy(model, [B])[0, len(B) :].tolist() == expected(plain, B)
        assert sets(run) == kept_of(plain, B)
        out = greedy(model, [A], max_new_tokens=None, max_length=len(A) + 4)
        assert out[0].tolist() == A + expected(plain, A)[:4]
        assert greedy(model, [A], max_new_tokens=1)[0].tolist() == A + expected(plain, A)[:1]
        assert run.phase is Phase.DECODE


def test_one_token_prompt_is_prefilled_densely() -> None:
    """A pass over one token is no sign of decoding: the phase says what it is."""
    model, plain = make()
    dense = model(torch.tensor([[7]])).logits[0, -1]
    with sparse(model, RULE) as run:
        assert run.phase is Phase.PREFILL
        out = greedy(model, [[7]], output_logits=True, return_dict_in_generate=True)
        assert torch.equal(out.logits[0][0], dense)
        assert sets(run) == kept_of(plain, [7])
    assert out.sequences[0, 1:].tolist() == expected(plain, [7])


def test_scores_and_returned_dictionary() -> None:
    model, plain = make()
    _, logits = sparse_greedy(plain, A, kept_of(plain, A), STEPS)
    with sparse(model, RULE):
        out = greedy(model, [A], return_dict_in_generate=True, output_scores=True)
    torch.testing.assert_close(torch.cat(out.scores), logits, rtol=1e-4, atol=1e-4)


class Conversation:
    """Turns by the reference: each prefilled densely, its core set from all prefilled tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache, self.last = model, {}, []
        self.seen: list[list[Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]

    @torch.no_grad()
    def turn(self, tokens: list[int]) -> tuple[list[int], dict[int, list[int]]]:
        new = self.last + tokens
        with hooked(self.model, lambda layer, h: self.seen[layer].append(h[0].clone())):
            out = self.model(torch.tensor([new]), use_cache=True, **self.cache)
        kept = {i: core_set(torch.cat(hs), 0.3, 0.4) for i, hs in enumerate(self.seen)}
        answer = [int(out.logits[0, -1].argmax())]
        with masked(self.model, kept):
            while len(answer) < STEPS:
                out = self.model(torch.tensor([answer[-1:]]), **cache_of(self.model, out))
                answer.append(int(out.logits[0, -1].argmax()))
        self.cache, self.last = cache_of(self.model, out), answer[-1:]
        self.cache.pop("use_cache")
        return answer, kept


@pytest.mark.parametrize("whole", [True, False])
def test_conversations_that_take_turns(whole: bool) -> None:
    """Passing the cache back goes on: statistics add up, one conversation apart from the other."""
    model, plain = make()
    name = next(iter(cache_of(model, {"cache": None, "past_key_values": None})))
    one, two = Conversation(plain), Conversation(plain)
    said: list[list[int]] = [[], []]
    caches: list[Any] = [DynamicCache(config=model.config) for _ in range(2)]
    with sparse(model, RULE) as run:
        for which, reference, turn in ((0, one, A), (1, two, B), (0, one, B), (1, two, A)):
            answer, kept = reference.turn(turn)
            history = said[which] + turn
            mask = torch.ones(1, len(history), dtype=torch.long)
            begin = caches[which].get_seq_length()
            ids = history if whole else history[begin:]
            out = greedy(model, [ids], attention_mask=mask, **{name: caches[which]})
            assert sets(run) == kept
            assert out[0, len(ids) :].tolist() == answer
            said[which] = history + answer


def test_a_cache_from_elsewhere_is_refused() -> None:
    model, _plain = make()
    cache = DynamicCache(config=model.config)
    name = next(iter(cache_of(model, {"cache": None, "past_key_values": None})))
    greedy(model, [A], **{name: cache})
    with sparse(model, RULE), pytest.raises(UserError, match="begin the conversation inside"):
        greedy(model, [A + B + A], **{name: cache})


def test_direct_passes_are_dense_until_select_and_sparse_after() -> None:
    model, plain = make()
    kept = kept_of(plain, A)
    dense = model(torch.tensor([A]), use_cache=True)
    with masked(model, kept):  # several tokens at once, and one
        many = model(torch.tensor([B]), **cache_of(model, dense))
        one = model(torch.tensor([[9]]), **cache_of(model, many))
    with sparse(model, RULE) as run:
        with pytest.raises(UserError, match="nothing was prefilled"):
            run.select()
        first = model(torch.tensor([A[:4]]), use_cache=True)
        second = model(torch.tensor([A[4:]]), **cache_of(model, first))
        torch.testing.assert_close(second.logits, dense.logits[:, 4:], rtol=1e-4, atol=1e-4)
        run.select()
        assert sets(run) == kept
        got = model(torch.tensor([B]), **cache_of(model, second))
        torch.testing.assert_close(got.logits, many.logits, rtol=1e-4, atol=1e-4)
        got = model(torch.tensor([[9]]), **cache_of(model, got))
        torch.testing.assert_close(got.logits, one.logits, rtol=1e-4, atol=1e-4)
        run.reset()
        assert run.density == 1.0
        again = model(torch.tensor([A]))
        assert torch.equal(again.logits, dense.logits)
        run.select()
        assert sets(run) == kept


def test_direct_passes_with_padding_and_other_batches() -> None:
    model, plain = make()
    ids, mask = padded(A, B)
    with sparse(model, RULE) as run:
        with pytest.raises(UserError, match="2-D"):
            model(torch.tensor(ids), attention_mask=mask[:, None, None].bool())
        model(torch.tensor(ids), attention_mask=mask)
        with pytest.raises(UserError, match="2 prompts were being read, the pass has 3"):
            model(torch.tensor([B, B, B]))
        run.select()
        assert [sets(run, 0), sets(run, 1)] == [kept_of(plain, A), kept_of(plain, B)]
        with pytest.raises(UserError, match="2 prompts, the pass has 4 rows"):
            model(torch.tensor([[1]] * 4))
        run.reset()
        with pytest.raises(UserError, match="the model itself"):
            model.model(torch.tensor([A]))


def _assistant() -> dict[str, Any]:
    return {"assistant_model": make(seed=1, num_hidden_layers=1)[0]}


@pytest.mark.parametrize(
    "options",
    [
        _assistant,
        lambda: {"prompt_lookup_num_tokens": 3},
        lambda: {"assistant_early_exit": 1},
        lambda: {"custom_generate": lambda model, input_ids, **_: model(input_ids)},
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_ways_of_generating_without_a_prefill_are_refused(options: Any, second: bool) -> None:
    model, plain = make()
    with sparse(model, RULE) as run:
        if second:  # no earlier answer's core neurons may serve this one
            greedy(model, [A])
        with pytest.raises(UserError, match="not supported inside sparse"):
            greedy(model, [A], **options())
        assert greedy(model, [B])[0, len(B) :].tolist() == expected(plain, B)
        assert sets(run) == kept_of(plain, B)


def test_contrastive_search_is_refused() -> None:
    model, _plain = make()
    with sparse(model, RULE), pytest.raises(ValueError, match=r"ontrastive|custom_generate|sparse"):
        greedy(model, [A], penalty_alpha=0.6, top_k=4)


def test_continuous_batching_is_refused() -> None:
    model, _plain = make()
    with sparse(model, RULE), pytest.raises(UserError, match="continuously batched"):
        model.generate_batch([A, B])


def test_use_cache_false_is_refused() -> None:
    model, _plain = make()
    with sparse(model, RULE), pytest.raises(UserError, match="use_cache=False"):
        greedy(model, [A], use_cache=False)


def test_generate_beside_generate_is_refused() -> None:
    model, plain = make()

    class Nosy(TextStreamer):
        def put(self, value: Tensor) -> None:
            with pytest.raises(UserError, match="already running"):
                greedy(model, [B])

    with sparse(model, RULE):
        out = greedy(model, [A], streamer=Nosy(tiny_tokenizer()))
    assert out[0, len(A) :].tolist() == expected(plain, A)


def test_the_oracle_is_refused() -> None:
    with pytest.raises(UserError, match="oracle"), sparse(make()[0], Oracle()):
        pass


def test_a_selector_that_does_not_fit_is_refused() -> None:
    with (
        pytest.raises(UserError, match="dense layer 3"),
        sparse(make()[0], Impact(dense_layers=(3,))),
    ):
        pass
