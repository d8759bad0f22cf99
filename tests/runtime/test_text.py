"""Tokens to a stream of text, and prompts to tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreinfer.errors import UserError
from coreinfer.runtime.text import TextStream, encode_pair, encode_prompt, encode_raw
from tests.tiny import BOS, EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def streamed(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER(text).input_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, stream
    return [*pieces, stream.finish()], stream


@given(st.text(max_size=40))
def test_the_pieces_are_the_text(text: str) -> None:
    pieces, stream = streamed(text)
    assert "".join(pieces) == stream.text == text


@given(st.text(max_size=40))
def test_no_piece_holds_half_a_character(text: str) -> None:
    pieces, _ = streamed(text.replace("\ufffd", ""))
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(alphabet="abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4)))
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    pieces, stream = streamed(text, tuple(stops))
    # A text stops as soon as one of the stop texts is complete.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first_complete = min((end for end, _ in ends), default=None)
    cuts = [start for end, start in ends if end == first_complete]
    expected = text if first_complete is None else text[: min(cuts)]
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == (first_complete is not None)


def test_half_a_character_at_the_end_is_shown_as_unreadable() -> None:
    stream = TextStream(TOKENIZER)
    tokens = TOKENIZER("aé").input_ids
    assert stream.push(tokens[0]) == "a"
    assert stream.push(tokens[1]) == ""
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_no_text() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.push(t) for t in (BOS, *TOKENIZER("x").input_ids, EOS)] == ["", "x", ""]


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_a_pair_is_its_whole_text_cut_at_the_seam(context: str, continuation: str) -> None:
    if not context.strip():
        with pytest.raises(UserError, match="the context is empty"):
            encode_pair(TOKENIZER, context, continuation)
        return
    first, second = encode_pair(TOKENIZER, context, continuation)
    assert first + second == TOKENIZER(context + continuation).input_ids
    assert TOKENIZER.decode(first) == context.rstrip()


def test_an_empty_prompt_is_refused() -> None:
    chat = tiny_tokenizer(chat=True)
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_raw(TOKENIZER, "")
    for text in ("", "  \n"):
        with pytest.raises(UserError, match="the prompt is empty"):
            encode_prompt(chat, text, raw=False)
    with pytest.raises(UserError, match="the continuation is empty"):
        encode_pair(TOKENIZER, "a", "")


@pytest.mark.parametrize("text", ["ab\udcff", "\ud83d"])
def test_text_that_is_no_unicode_is_refused(text: str) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    for encode in (
        lambda: encode_raw(tokenizer, text),
        lambda: encode_prompt(tokenizer, text, raw=False),
        lambda: encode_pair(tokenizer, text, "x"),
        lambda: encode_pair(tokenizer, "x", text),
    ):
        with pytest.raises(UserError, match=r"'\\u....', which is no character") as refusal:
            encode()
        assert str(refusal.value).isascii()


def test_a_prompt_goes_through_the_chat_template_unless_raw() -> None:
    chat = tiny_tokenizer(chat=True)
    ids = encode_prompt(chat, "hi", raw=False)
    assert chat.decode(ids) == "<bos>user: hi<eos><bos>assistant: "
    assert ids.count(BOS) == 2
    assert encode_prompt(chat, "hi", raw=True) == TOKENIZER("hi").input_ids
    assert encode_prompt(TOKENIZER, "hi", raw=False) == TOKENIZER("hi").input_ids


def test_a_template_that_refuses_is_quoted() -> None:
    chat = tiny_tokenizer(chat=True)
    chat.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(UserError, match="refuses this conversation: no users here"):
        encode_prompt(chat, "hi", raw=False)
