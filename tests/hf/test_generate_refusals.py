"""Ways of generating that sparse decoding cannot serve are refused, and nothing is harmed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from transformers import (
    TextStreamer,
)

from coreinfer.backends.hf.sparse import sparse
from coreinfer.errors import UserError
from coreinfer.selectors import Impact, Oracle
from tests.hf.generating import RULE, A, B, expected, greedy, kept_of, make, sets
from tests.tiny import tiny_tokenizer


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
