"""The prompts to tune on: some to search with, others to report on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coreinfer.api import LLM
from coreinfer.backends.base import Backend
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Window, require_window, windows
from coreinfer.jsonl import OnSkip, is_text, read_jsonl, read_text
from coreinfer.runtime.generation import require_room
from coreinfer.runtime.text import encode_prompt
from coreinfer.selectors import Dense

LEAST_ANSWER = 2  # tokens: the first of a continuation is the dense prefill's and does not count


@dataclass(frozen=True)
class Amount:
    """How much is read.

    Attributes:
        search, report: prompts to search with and to report on, at most.
        descent: prompts that the budgets of layers descend on, at most; they may be among those to
            search with, never among those to report on.
        prompt_tokens: of each window of a text; prompts of a .jsonl file stay whole.
        continuation_tokens: that quality is measured on, at most; the first of them is the dense
            prefill's and does not count.
        raw: prompts are sent as they are, without the model's chat template.
    """

    search: int = 16
    report: int = 40
    descent: int = 160
    prompt_tokens: int = 200
    continuation_tokens: int = 60
    raw: bool = False

    def __post_init__(self) -> None:
        least = {
            "search": 1,
            "report": 1,
            "descent": 1,
            "prompt_tokens": 1,
            "continuation_tokens": LEAST_ANSWER,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                what = name.replace("_", " ")
                raise UserError(f"{what} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Split:
    """Lists of windows; those to report on share no prompt and no piece of text with the others."""

    search: list[Window]
    report: list[Window]
    descent: list[Window]


def read_split(backend: Backend, path: str | Path, amount: Amount, on_skip: OnSkip) -> Split:
    """Prompts with what follows them, in two parts: to report on, and the others.

    A `.jsonl` file has a prompt a line, {"prompt": ...}, and may have the "continuation" that
    quality is measured on; without one it is the model's own dense answer. Its prompts, each once,
    go to the two parts by turns; one that leaves no room for an answer in the model's context goes
    to `on_skip`. Any other file is one text: windows of its first half are
    searched with, windows of its second half reported on.

    Raises:
        UserError: if the file is missing, damaged or too short to be split, or windows are longer
            than the model reads.
    """
    if Path(path).suffix.lower() == ".jsonl":
        return _split_prompts(backend, path, amount, on_skip)
    require_window(backend, amount.prompt_tokens, amount.continuation_tokens)
    text = read_text(path)
    middle = len(text) // 2
    middle = text.find("\n", middle) + 1 or middle

    def cut(what: str, piece: str, count: int) -> list[Window]:
        try:
            return windows(
                backend,
                piece,
                count=count,
                prompt_tokens=amount.prompt_tokens,
                continuation_tokens=amount.continuation_tokens,
            )
        except UserError as error:
            raise UserError(f"{str(path)!r}, the half to {what} with: {error}") from None

    first, second = text[:middle], text[middle:]
    tokens = len(backend.tokenizer(first, add_special_tokens=False, verbose=False).input_ids)
    room = tokens // (amount.prompt_tokens + amount.continuation_tokens)
    search = cut("search", first, amount.search)
    descent = cut("search", first, max(min(amount.descent, room), 1))
    random.Random(0).shuffle(descent)  # neighbours are alike: a step is to see different ones
    return Split(search, cut("report", second, amount.report), descent)


@dataclass(frozen=True)
class _Prompt:
    """A prompt of a .jsonl file: as text and as tokens, and the continuation given with it."""

    text: str
    ids: list[int]
    continuation: str | None


def _split_prompts(backend: Backend, path: str | Path, amount: Amount, on_skip: OnSkip) -> Split:
    given: dict[str, _Prompt] = {}
    wanted = 2 * max(amount.search, amount.report, amount.descent)
    for line, row in read_jsonl(path, ["prompt"], on_skip):
        continuation = row.get("continuation")
        if not row["prompt"].strip():
            on_skip(f"{str(path)!r}: line {line} has an empty prompt")
        elif continuation is not None and not is_text(continuation):
            on_skip(f"{str(path)!r}: line {line} has a 'continuation' that is not text")
        elif row["prompt"] not in given:
            try:
                ids = list(encode_prompt(backend.tokenizer, row["prompt"], raw=amount.raw))
                require_room(backend, len(ids))
            except UserError as error:
                on_skip(f"{str(path)!r}: line {line}: {error}")
                continue
            given[row["prompt"]] = _Prompt(row["prompt"], ids, continuation)
        if len(given) == wanted:
            break
    prompts = list(given.values())
    others = prompts[0::2][: max(amount.search, amount.descent)]
    learnt = _with_continuations(backend, others, amount, on_skip)
    report = _with_continuations(backend, prompts[1::2][: amount.report], amount, on_skip)
    if not learnt or not report:
        raise UserError(
            f"{str(path)!r} has {len(prompts)} different prompts with an answer of two tokens or "
            "more; at least 2 are needed, one to search with and one to report on"
        )
    return Split(learnt[: amount.search], report, learnt[: amount.descent])


def _with_continuations(
    backend: Backend,
    prompts: Sequence[_Prompt],
    amount: Amount,
    on_skip: OnSkip,
) -> list[Window]:
    unanswered = [prompt.text for prompt in prompts if prompt.continuation is None]
    answers = LLM(backend).generate(
        unanswered, Dense(), None, raw=amount.raw, max_new_tokens=amount.continuation_tokens
    )
    tokens = dict(zip(unanswered, (answer.token_ids for answer in answers), strict=True))
    made = []
    for prompt in prompts:
        if prompt.continuation is None:
            continuation = tokens[prompt.text]
        else:
            ids = backend.tokenizer(prompt.continuation, add_special_tokens=False, verbose=False)
            continuation = list(ids.input_ids)[: _room(backend, prompt, amount)]
        if len(continuation) < LEAST_ANSWER:
            on_skip(
                f"the prompt {prompt.text[:40]!r} has an answer of fewer than {LEAST_ANSWER} tokens"
            )
            continue
        made.append(Window(prompt.ids, continuation, prompt.text))
    return made


def _room(backend: Backend, prompt: _Prompt, amount: Amount) -> int:
    """Tokens of a continuation that are wanted and that the model's context has room for."""
    length = backend.context_length
    if length is None:
        return amount.continuation_tokens
    return min(amount.continuation_tokens, length - len(prompt.ids))
