"""Prompts to token ids, and token ids back to a stream of text."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from coreinfer.errors import UserError

Message = dict[str, str]  # {"role": ..., "content": ...}


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text as it is, with the special tokens the tokenizer adds by itself.

    Raises:
        UserError: if the text is empty, or no valid Unicode.
    """
    if not text:
        raise UserError("the prompt is empty; give at least one character")
    ids = _token_ids(tokenizer, text)
    if not ids:
        raise UserError(f"the prompt {text[:40]!r} has no token in this model's vocabulary")
    return ids


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """A conversation as the model's chat template writes it, ready for the assistant's turn.

    Raises:
        UserError: if the template refuses the conversation, with its own reason.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}") from None
    assert isinstance(text, str)
    return text


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text in which the special tokens are already written.

    Raises:
        UserError: if the text is no valid Unicode.
    """
    return _token_ids(tokenizer, text, add_special_tokens=False)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool) -> list[int]:
    """A user's prompt: through the chat template where the model has one, unless `raw`."""
    if raw or tokenizer.chat_template is None:
        return encode_raw(tokenizer, prompt)
    if not prompt.strip():
        raise UserError("the prompt is empty; give at least one character")
    return encode_text(tokenizer, render_messages(tokenizer, [{"role": "user", "content": prompt}]))


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, split as lm-evaluation-harness does.

    Both are encoded as one text, since a tokenizer may merge across the seam; spaces at the end of
    the context go to the continuation.

    Raises:
        UserError: if either is empty, or the continuation has no token of its own.
    """
    if not context.strip():
        raise UserError("the context is empty; core neurons are chosen from it, so give some text")
    if not continuation:
        raise UserError("the continuation is empty; there is nothing to score")
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = _token_ids(tokenizer, context + continuation)
    first = _token_ids(tokenizer, context)
    if len(whole) <= len(first):
        raise UserError(f"the continuation {continuation[:40]!r} adds no token to its context")
    return whole[: len(first)], whole[len(first) :]


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    try:  # bytes of the shell that are no UTF-8 come as half surrogate pairs: no tokenizer's text
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise UserError(
            f"the text holds {bad!r}, which is no character; give it as UTF-8"
        ) from None
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)


class TextStream:
    """Turns tokens into text as they come, and stops at a stop text.

    Text is held back while it ends in half a character, or in what may become a stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._settled = 0  # tokens before this one are text that no later token changes
        self._done = ""  # their text
        self._emitted = 0  # characters given out
        self.stopped = False

    @property
    def text(self) -> str:
        """All text given out so far."""
        return self._full[: self._emitted]

    @property
    def _full(self) -> str:
        return self._done + self._tail()

    def _tail(self) -> str:
        # One settled token goes before, since a tokenizer may treat the first token of a text in
        # a way of its own (a leading space).
        start = max(self._settled - 1, 0)
        lead = self._decode(self._tokens[start : self._settled])
        return self._decode(self._tokens[start:])[len(lead) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def push(self, token: int) -> str:
        """Add a token; the text it makes certain."""
        self._tokens.append(token)
        tail = self._tail()
        if not tail.endswith("\ufffd"):
            self._done, self._settled = self._done + tail, len(self._tokens)
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return "" if self.stopped else self._release(final=True)

    def _release(self, *, final: bool) -> str:
        text = self._full if final else self._done
        cut = min((at for s in self._stop if (at := text.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            limit = cut
        else:
            limit = len(text)
            if not final:
                limit -= max((_overhang(text, s) for s in self._stop), default=0)
        piece = text[self._emitted : limit]
        self._emitted = max(self._emitted, limit)
        return piece


def _overhang(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)
