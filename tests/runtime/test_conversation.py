"""A conversation: history, the shared session, and statistics that merge."""

from __future__ import annotations

import pytest

from coreinfer.errors import UserError
from coreinfer.runtime.conversation import Conversation
from coreinfer.runtime.records import GenerationRecord
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.runtime.text import encode_text, render_messages
from coreinfer.selectors import Dense, Impact, Selector, Stability
from tests.tiny import tiny_backend

SHORT = SamplingParams(max_new_tokens=6)


def say(conversation: Conversation, text: str, selector: Selector) -> GenerationRecord:
    *_, last = conversation.reply(text, selector, params=SHORT)
    assert last.record is not None
    return last.record


def readable_backend() -> object:
    """A backend whose answers are ASCII, so that text and tokens are one to one."""
    backend = tiny_backend(chat=True)
    head = backend.model.get_output_embeddings()
    allowed = backend.tokenizer("abcdefgh xyz").input_ids
    forbidden = [i for i in range(head.weight.shape[0]) if i not in allowed]
    backend.model.get_input_embeddings()  # tied or not, the head's own rows are changed
    head.weight.data[forbidden] = 0
    return backend


def test_a_dense_conversation_says_what_reading_it_all_again_says() -> None:
    backend = readable_backend()
    conversation = Conversation(backend)  # type: ignore[arg-type]
    for question in ("hello", "how are you?", "good bye"):
        asked = [*conversation.messages, {"role": "user", "content": question}]
        record = say(conversation, question, Dense())
        fresh = Conversation(backend, asked[:-1])  # type: ignore[arg-type]
        assert say(fresh, question, Dense()).token_ids == record.token_ids
        assert conversation.messages == [*asked, {"role": "assistant", "content": record.text}]


def test_a_turn_reads_only_what_is_new() -> None:
    backend = readable_backend()
    conversation = Conversation(backend)  # type: ignore[arg-type]
    first = say(conversation, "hello", Stability())
    assert conversation._turns is not None
    session = conversation._turns.session
    say(conversation, "again", Stability())
    assert conversation._turns.session is session
    text = render_messages(backend.tokenizer, conversation.messages[:3])  # type: ignore[attr-defined]
    whole = encode_text(backend.tokenizer, text)  # type: ignore[attr-defined]
    (evidence,) = session.evidence()
    # What was decoded is in the cache and not counted, but for the last token of the first
    # answer, which the second turn fed; the BOS that begins the conversation does not count.
    assert evidence.tokens == len(whole) - first.generated_tokens + 1 - 1


def test_changed_settings_that_need_other_statistics_read_again() -> None:
    conversation = Conversation(readable_backend())  # type: ignore[arg-type]
    say(conversation, "hello", Impact())
    assert conversation._turns is not None
    session = conversation._turns.session
    say(conversation, "again", Impact(beta=0.7))
    assert conversation._turns.session is session
    say(conversation, "more", Stability())
    assert conversation._turns.session is not session


def test_a_template_that_rewrites_the_past_reads_again() -> None:
    backend = readable_backend()
    backend.tokenizer.chat_template = (  # type: ignore[attr-defined]
        "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    )
    conversation = Conversation(backend)  # type: ignore[arg-type]
    say(conversation, "hello", Stability())
    assert conversation._turns is not None
    session = conversation._turns.session
    say(conversation, "again", Stability())
    assert conversation._turns.session is not session


def test_a_stop_text_does_not_leak_into_the_next_turn() -> None:
    backend = readable_backend()
    plain = say(Conversation(backend), "hello", Dense())  # type: ignore[arg-type]
    conversation = Conversation(backend)  # type: ignore[arg-type]
    params = SamplingParams(max_new_tokens=6, stop=(plain.text[2],))
    *_, last = conversation.reply("hello", Dense(), params=params)
    assert last.record is not None
    assert last.record.finish_reason == "stop"
    fresh = Conversation(backend, list(conversation.messages))  # type: ignore[arg-type]
    assert say(conversation, "and?", Dense()).token_ids == say(fresh, "and?", Dense()).token_ids


def test_an_answer_that_is_cut_short_leaves_the_history() -> None:
    conversation = Conversation(readable_backend())  # type: ignore[arg-type]
    say(conversation, "hello", Dense())
    before = list(conversation.messages)
    answer = conversation.reply("interrupted", Dense(), params=SHORT)
    next(answer)
    answer.close()
    assert conversation.messages == before
    assert say(conversation, "go on", Dense()).generated_tokens == 6
    assert len(conversation.messages) == len(before) + 2


def test_an_empty_message_and_a_model_without_template_are_refused() -> None:
    with pytest.raises(UserError, match="the message is empty"):
        next(Conversation(tiny_backend(chat=True)).reply("  ", Dense()))
    with pytest.raises(UserError, match="tiny-llama has no chat template"):
        Conversation(tiny_backend())
