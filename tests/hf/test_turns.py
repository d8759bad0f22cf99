"""Conversations and direct passes inside `sparse`: who goes on with whose statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from coreinfer.backends.hf.sparse import sparse
from coreinfer.errors import UserError
from tests.hf.generating import RULE, STEPS, A, B, greedy, kept_of, make, padded, sets
from tests.hf.reference import cache_of, core_set, hooked, masked


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
