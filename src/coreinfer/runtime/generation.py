"""The generation loop: one dense prefill, one selection, then decode with the core neurons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from torch import Tensor

from coreinfer.backends.base import Backend, Session
from coreinfer.errors import UserError
from coreinfer.recording import RecordingPlan
from coreinfer.runtime.cost import bytes_per_token
from coreinfer.runtime.records import GenerationRecord, Piece, peak_memory_bytes
from coreinfer.runtime.sampling import Sampler, SamplingParams
from coreinfer.runtime.text import TextStream
from coreinfer.selectors import Selector
from coreinfer.standins import StandIn


@dataclass(frozen=True)
class Prefilled:
    """A batch of sequences that was read up to here and can be continued.

    Attributes:
        session: its session; `continue_from` moves it on.
        logits: [B, V], what follows each sequence.
        tokens: what each sequence has read, earlier turns included.
        seconds: what the prefill took.
    """

    session: Session
    logits: Tensor
    tokens: list[list[int]]
    seconds: float

    @property
    def prompt_tokens(self) -> list[int]:
        """How many tokens each sequence has read."""
        return [len(row) for row in self.tokens]

    def fork(self) -> Prefilled:
        """The same on a session of its own, so that this one can be continued again."""
        return replace(self, session=self.session.fork())


def require_room(backend: Backend, prompt_tokens: int) -> None:
    """Raises UserError if a prompt leaves no room in the model's context."""
    length = backend.context_length
    if length is not None and prompt_tokens >= length:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens, {backend.model_name} reads {length} at most "
            "and needs room for an answer; shorten the prompt"
        )


def prefill(
    backend: Backend,
    token_ids: Sequence[Sequence[int]],
    plan: RecordingPlan,
    texts: Sequence[str] | None = None,
) -> Prefilled:
    """Read prompts densely and record what `plan` asks for.

    Raises:
        UserError: if a prompt leaves no room in the model's context.
    """
    return prefill_on(backend, backend.start(plan), token_ids, [[]] * len(token_ids), texts)


def prefill_on(
    backend: Backend,
    session: Session,
    token_ids: Sequence[Sequence[int]],
    before: Sequence[Sequence[int]],
    texts: Sequence[str] | None = None,
) -> Prefilled:
    """Read more on a session whose sequences have read `before`: the next turn of a chat.

    Raises:
        UserError: if a sequence leaves no room in the model's context.
    """
    tokens = [[*old, *row] for old, row in zip(before, token_ids, strict=True)]
    for row in tokens:
        require_room(backend, len(row))
    began = perf_counter()
    logits = session.prefill(token_ids, texts)
    backend.synchronize()
    return Prefilled(session, logits, tokens, perf_counter() - began)


def generate(
    backend: Backend,
    token_ids: Sequence[Sequence[int]],
    selector: Selector,
    stand_in: StandIn | None = None,
    params: SamplingParams | None = None,
    texts: Sequence[str] | None = None,
) -> Iterator[Piece]:
    """Answer a batch of prompts, streamed; each has its own core set.

    Args:
        backend: the model.
        token_ids: the prompts.
        selector: the rule that chooses the core neurons.
        stand_in: what takes the place of the dropped neurons; None drops them.
        params: how tokens are drawn and when an answer ends.
        texts: the prompts as text, for selectors that embed them.

    Raises:
        UserError: if a prompt is too long or the selector does not fit the model.
    """
    backend.check(selector, stand_in)
    read = prefill(backend, token_ids, RecordingPlan.expecting(selector, stand_in), texts)
    yield from continue_from(backend, read, selector, stand_in, params)


def continue_from(
    backend: Backend,
    read: Prefilled,
    selector: Selector,
    stand_in: StandIn | None = None,
    params: SamplingParams | None = None,
) -> Iterator[Piece]:
    """Select and decode on what was prefilled; its session ends up behind the last token fed."""
    params = params or SamplingParams()
    session = read.session
    if selector.needs_future:
        session.look_ahead(_dense_answers(backend, read, params))
    began = perf_counter()
    choices = session.select(selector, stand_in)
    backend.synchronize()
    select_s = perf_counter() - began
    answers = [_Answer(backend, params, prompt) for prompt in read.tokens]
    steps = _decode(session, read.logits, answers)
    seconds: list[float] = []  # of each step; what the reader of the stream does is not in it
    began = perf_counter()
    while (texts := next(steps, None)) is not None:
        seconds.append(perf_counter() - began)
        for index, text in enumerate(texts):
            if text:
                yield Piece(index, text)
        began = perf_counter()
    read_a_token = bytes_per_token(backend, session, selector, choices)
    for index, (answer, choice) in enumerate(zip(answers, choices, strict=True)):
        core_set = choice.core_set
        keep = selector.keep_where(core_set.layers)
        rest = sum(seconds[1 : len(answer.tokens)])
        record = GenerationRecord(
            prompt_tokens=read.prompt_tokens[index],
            generated_tokens=len(answer.tokens),
            text=answer.stream.text,
            token_ids=answer.tokens,
            finish_reason=answer.finish_reason or "length",
            selector=selector.name,
            alpha=selector.counting_alpha,
            beta=keep if selector.keep_name == "beta" else None,
            active=selector.active_share(core_set.layers),
            gamma=keep if selector.keep_name == "gamma" else None,
            stand_in="none" if stand_in is None else stand_in.name,
            dense_layers=[i for i in range(core_set.num_layers) if i not in core_set.layers],
            density=core_set.density,
            bytes_per_token=read_a_token[index],
            dense_bytes_per_token=backend.cost.dense,
            prefill_s=read.seconds,
            select_s=select_s,
            decode_s=sum(seconds[: len(answer.tokens)]),
            decode_tokens_per_s=(len(answer.tokens) - 1) / rest if rest > 0 else None,
            peak_memory_bytes=peak_memory_bytes(),
            backend=backend.name,
            dtype=backend.dtype,
            model=backend.model_name,
            notes=choice.notes,
        )
        yield Piece(index, "", record)


class _Answer:
    """The tokens and text of one sequence while it is decoded."""

    def __init__(self, backend: Backend, params: SamplingParams, prompt: Sequence[int]) -> None:
        self._prompt = prompt
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.stream = TextStream(backend.tokenizer, params.stop)
        self._sample = Sampler(params)
        self._eos = frozenset() if params.ignore_eos else backend.eos_token_ids
        self._limit = params.max_new_tokens
        if backend.context_length is not None:
            self._limit = min(self._limit, backend.context_length - len(prompt))

    def step(self, logits: Tensor) -> str:
        """Draw a token from logits [V]; the text that becomes certain by it."""
        if self.finish_reason is not None:
            return ""
        token = self._sample(logits, [*self._prompt, *self.tokens])
        self.tokens.append(token)
        if token in self._eos:
            self.finish_reason = "eos"
            return self.stream.finish()
        text = self.stream.push(token)
        if not self.stream.stopped and len(self.tokens) >= self._limit:
            text += self.stream.finish()
            self.finish_reason = "length"
        if self.stream.stopped:
            self.finish_reason = "stop"
        return text


def _decode(session: Session, logits: Tensor, answers: Sequence[_Answer]) -> Iterator[list[str]]:
    """Step all answers until each has ended; the texts of each step.

    One that has ended is fed nothing: it costs nothing more, and stays inside the context.
    """
    while True:
        yield [answer.step(row) for answer, row in zip(answers, logits, strict=True)]
        if all(answer.finish_reason for answer in answers):
            return
        fed = [[] if answer.finish_reason else answer.tokens[-1:] for answer in answers]
        logits = session.decode(fed)[:, -1]


def _dense_answers(backend: Backend, read: Prefilled, params: SamplingParams) -> list[list[int]]:
    """What dense decoding says, for the oracle to look at."""
    answers = [_Answer(backend, params, prompt) for prompt in read.tokens]
    for _ in _decode(read.session.fork(), read.logits, answers):
        pass
    return [answer.tokens for answer in answers]
