"""A conversation: one session through all turns, each turn's statistics added to the others'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coreinfer.backends.base import Backend, Session
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.generation import Prefilled, continue_from, prefill, prefill_on
from coreinfer.runtime.records import Piece
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.runtime.text import Message, encode_text, render_messages
from coreinfer.selectors import Selector
from coreinfer.standins import StandIn


@dataclass
class _Turns:
    """What a session has read: as text, and as the tokens that are in its KV cache.

    `pending` is the last token drawn: a token is fed only when another one is to follow it.
    """

    session: Session
    plan: RecordingPlan
    text: str
    tokens: list[int]
    pending: list[int]


class Conversation:
    """Messages, and the session that has read them.

    Each turn prefills only what is new, densely, and chooses the core neurons from the statistics
    of all turns. Tokens of the answers stay in the KV cache as they were decoded and are not
    counted. Where the chat template rewrites what was said before (some drop earlier reasoning),
    or the settings ask for other statistics, the conversation is read again from the start.

    Attributes:
        messages: the history, {"role", "content"} each.
    """

    def __init__(self, backend: Backend, messages: list[Message] | None = None) -> None:
        if backend.tokenizer.chat_template is None:
            raise UserError(
                f"{backend.model_name} has no chat template; use 'generate' to continue a text"
            )
        self.messages: list[Message] = list(messages or [])
        self._backend = backend
        self._turns: _Turns | None = None

    def reply(
        self,
        content: str,
        selector: Selector,
        stand_in: StandIn | None = None,
        params: SamplingParams | None = None,
    ) -> Iterator[Piece]:
        """Say something; the answer is streamed, and both join the history when it is complete.

        An answer that is cut short (the iterator is closed, an error, Ctrl-C) leaves the history
        as it was.

        Raises:
            UserError: if the message is empty, or the conversation no longer fits the context.
        """
        if not content.strip():
            raise UserError("the message is empty; give at least one character")
        self._backend.check(selector, stand_in)
        asked = [*self.messages, {"role": "user", "content": content}]
        text = render_messages(self._backend.tokenizer, asked)
        plan = RecordingPlan.expecting(selector, stand_in)
        turns, self._turns = self._turns, None  # if this fails, the next turn starts afresh
        read = self._read(turns, text, plan, content)
        for piece in continue_from(self._backend, read, selector, stand_in, params):
            if piece.record is not None:
                record = piece.record
                self.messages = [*asked, {"role": "assistant", "content": record.text}]
                # Otherwise there are tokens in the cache that are not in the answer's text.
                if record.finish_reason != "stop" and not (params and params.ignore_eos):
                    self._turns = _Turns(
                        session=read.session,
                        plan=plan,
                        text=text + record.text,
                        tokens=read.tokens[0] + record.token_ids[:-1],
                        pending=[] if record.finish_reason == "eos" else record.token_ids[-1:],
                    )
            yield piece

    def _read(
        self, turns: _Turns | None, text: str, plan: RecordingPlan, content: str
    ) -> Prefilled:
        tokenizer = self._backend.tokenizer
        if turns is not None and turns.plan.covers(plan) and text.startswith(turns.text):
            new = turns.pending + encode_text(tokenizer, text[len(turns.text) :])
            return prefill_on(self._backend, turns.session, [new], [turns.tokens], [content])
        return prefill(self._backend, [encode_text(tokenizer, text)], plan, [content])
