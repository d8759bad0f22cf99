"""The Python surface."""

from __future__ import annotations

from pathlib import Path

import pytest

import coreinfer
from coreinfer.api import LLM, in_batches
from coreinfer.errors import UserError
from coreinfer.kernels.library import kernel_path
from coreinfer.selectors import Dense, Impact, Stability
from coreinfer.standins import Linear
from tests.tiny import tiny_backend, tiny_model, tiny_tokenizer


def test_a_stream_ends_with_its_record() -> None:
    llm = LLM(tiny_backend(chat=True))
    *pieces, last = llm.stream("hi", Impact(beta=0.5), Linear(rank=2), max_new_tokens=6)
    assert last.record is not None
    assert all(piece.record is None for piece in pieces)
    assert "".join(piece.text for piece in pieces) == last.record.text
    assert (last.record.selector, last.record.stand_in) == ("impact", "linear")


def test_generate_takes_one_prompt_or_many() -> None:
    llm = LLM(tiny_backend())
    (alone,) = llm.generate("one", Stability(beta=0.5), max_new_tokens=5)
    both = llm.generate(["one", "two two"], Stability(beta=0.5), max_new_tokens=5)
    assert both[0].token_ids == alone.token_ids
    assert len(both) == 2
    assert llm.generate([], max_new_tokens=5) == []


def test_compare_starts_both_answers_from_one_prefill() -> None:
    llm, shown = LLM(tiny_backend()), []
    comparison = llm.compare(
        "some prompt",
        Impact(beta=0.1),
        max_new_tokens=6,
        on_piece=lambda engine, _piece: shown.append(engine),
    )
    assert (
        comparison.dense.token_ids
        == llm.generate("some prompt", Dense(), max_new_tokens=6)[0].token_ids
    )
    assert (
        comparison.sparse.token_ids
        == llm.generate("some prompt", Impact(beta=0.1), max_new_tokens=6)[0].token_ids
    )
    assert shown[:2] == ["dense", "sparse"]  # they take turns
    same = llm.compare("some prompt", Impact(beta=1.0), max_new_tokens=6)
    assert same.first_difference is None


def test_the_core_set_of_a_prompt_can_be_used_again() -> None:
    llm = LLM(tiny_backend())
    core_set = llm.select("some prompt", Impact(beta=0.3))
    fixed = coreinfer.Fixed(core_set=core_set)
    (a,) = llm.generate("some prompt", Impact(beta=0.3), max_new_tokens=5)
    (b,) = llm.generate("some prompt", fixed, max_new_tokens=5)
    assert a.token_ids == b.token_ids


def test_scores_are_streamed_in_batches() -> None:
    llm = LLM(tiny_backend())
    pairs = [("context one", " and on"), ("two", " x"), ("three", "yes")]
    one, three = (list(llm.score(pairs, batch_size=n)) for n in (1, 3))
    assert [s.logprob for s in one] == pytest.approx([s.logprob for s in three], abs=1e-4)


def test_unknown_backends_batch_sizes_and_sampling_options_are_refused() -> None:
    with pytest.raises(UserError, match="there is no backend 'abacus'"):
        coreinfer.load("x", backend="abacus")
    with pytest.raises(UserError, match="the batch size must be at least 1, got 0"):
        list(in_batches([1], 0))
    with pytest.raises(TypeError, match="heat"):
        LLM(tiny_backend()).stream("x", heat=1)


def test_a_backend_that_does_not_know_the_model_is_passed_over_and_named(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    notes: list[str] = []
    assert coreinfer.load(str(tmp_path), on_progress=notes.append).backend.name == "hf"
    if kernel_path() != "twin":
        assert any("native backend does not do the architecture 'gpt2'" in note for note in notes)
    with pytest.raises(UserError, match="does not do the architecture 'gpt2'; use --backend hf"):
        coreinfer.load(str(tmp_path), backend="native")
