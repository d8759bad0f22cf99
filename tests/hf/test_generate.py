"""transformers' own `generate` inside `sparse`, against the masked reference."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    TextIteratorStreamer,
    TextStreamer,
)

from coreinfer.backends.base import Phase
from coreinfer.backends.hf.sparse import sparse
from coreinfer.selectors import Stability
from tests.hf.generating import RULE, STEPS, A, B, expected, greedy, kept_of, make, padded, sets
from tests.hf.reference import activations, core_set, masked, sparse_greedy
from tests.tiny import BOS, tiny_tokenizer


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"sliding_window": 5}),
        ("opt", {"word_embed_proj_dim": 20}),
        ("gpt2", {}),
        ("falcon", {}),
        ("falcon", {"alibi": True}),
    ],
)
def test_a_left_padded_batch_equals_each_alone(family: str, changes: dict[str, Any]) -> None:
    model, plain = make(family, **changes)
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


@pytest.mark.parametrize("count_bos", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_beginning_of_sequence_token_counts_only_if_told_to(
    count_bos: bool, chunk: int | None
) -> None:
    model, plain = make()
    rule = Stability(alpha=0.3, beta=0.4, count_bos=count_bos)
    ids, mask = padded([BOS, *A], [BOS, *B])
    with sparse(model, rule) as run:
        greedy(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    for row, prompt in enumerate((A, B)):
        counted = [h[0 if count_bos else 1 :] for _, h in activations(plain, [BOS, *prompt])]
        assert sets(run, row) == {i: core_set(h, 0.3, 0.4) for i, h in enumerate(counted)}


def test_scores_and_returned_dictionary() -> None:
    model, plain = make()
    _, logits = sparse_greedy(plain, A, kept_of(plain, A), STEPS)
    with sparse(model, RULE):
        out = greedy(model, [A], return_dict_in_generate=True, output_scores=True)
    torch.testing.assert_close(torch.cat(out.scores), logits, rtol=1e-4, atol=1e-4)


def test_nothing_is_compiled_meanwhile() -> None:
    """A compiled pass would go on with the linears it was traced with."""
    model, plain = make()
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    with sparse(model, RULE):
        out = greedy(model, [A], cache_implementation="static", compile_config=everywhere)
    assert out[0, len(A) :].tolist() == expected(plain, A)
    assert not hasattr(model, "_compiled_call")
